"""What datasets become: compounds, enums, opaque bytes, sequences of variable length, any axis, the first samples of a file."""

import io

import h5py
import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError, DataError, TreeError
from functrain.data import hdf5
from functrain.data.laws import check_source

N = 11
POINT = np.dtype([("x", "<f4"), ("n", ">i4"), ("flag", "?")])
RECORD = np.dtype([("id", "<u2"), ("at", POINT), ("window", ">f8", (2, 3)), ("pair", POINT, (2,)), ("z", "<c8"), ("raw", "V3")])


def records(dtype=RECORD, length=N):
    """Random records, of which every byte counts but for what is a bool."""
    rng = np.random.default_rng(0)
    array = np.zeros(length, dtype)
    array["id"], array["z"] = np.arange(length), rng.normal(size=length)
    array["at"]["x"], array["at"]["n"], array["at"]["flag"] = (
        rng.normal(size=length),
        np.arange(length) - 7,
        rng.random(length) < 0.5,
    )
    array["window"] = rng.normal(size=(length, 2, 3))
    array["pair"]["x"], array["pair"]["n"] = rng.normal(size=(length, 2)), np.arange(2 * length).reshape(length, 2)
    array["raw"] = rng.integers(0, 256, (length, 3), np.uint8).view("V3")[:, 0]
    return array


def expected(array):
    """Rows of NumPy records as trees of native arrays."""
    if array.dtype.names:
        return {name: expected(array[name]) for name in array.dtype.names}
    if array.dtype.kind == "V":
        return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape, array.itemsize)
    return array.astype(array.dtype.newbyteorder("="))


def check_same(ours, theirs):
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            check_same(ours[name], theirs[name])
    else:
        assert ours.numpy().dtype == theirs.dtype
        assert np.array_equal(ours.numpy(), theirs)


def row(tree, place):
    return {name: row(leaf, place) if isinstance(leaf, dict) else leaf[place] for name, leaf in tree.items()}


@pytest.mark.parametrize("storage", [{}, {"chunks": 5}, {"chunks": 5, "compression": "gzip", "shuffle": True}])
def test_compounds_are_trees_of_their_fields(tmp_path, storage):
    path, array = tmp_path / "a.h5", records()
    with h5py.File(path, "w") as file:
        file.create_dataset("table", data=array, **storage)
    with hdf5(path, "table") as source:
        check_same(source.take(np.arange(N), 0), expected(array))
        check_same(source.take(np.array([7, 2, 2, 10]), 0), expected(array[[7, 2, 2, 10]]))
        check_same(source(3), row(expected(array), 3))
        check_source(source)


def test_fields_are_chosen_by_name(tmp_path):
    path, array = tmp_path / "a.h5", records()
    named = np.zeros(N, [("name", "S4"), ("a/b", "<f4"), ("text", h5py.string_dtype())])
    named["a/b"], named["text"] = np.arange(N), "text"
    with h5py.File(path, "w") as file:
        file["g/table"], file["g/named"], file["g/plain"] = array, named, np.arange(N)
    with hdf5(path, "g", datasets=["table/at/x", "plain", "table/at", "named/a/b"]) as source:
        assert list(source(0)) == ["table/at/x", "plain", "table/at", "named/a/b"]
        batch = source.batch(N)(0)
        assert np.array_equal(batch["table/at/x"], array["at"]["x"])
        assert np.array_equal(batch["named/a/b"], named["a/b"])
        check_same(batch["table/at"], expected(array["at"]))
        assert "field at/x" in str(source.explain())
    with hdf5(path, "g/table/pair/n") as bare:
        assert np.array_equal(bare.batch(N)(0), array["pair"]["n"])
        check_source(bare)
    for group, message in [
        ("g/named", "field 'name' of dataset 'g/named' .* has dtype string.*datasets=\\['a/b'\\]"),
        ("g/named/text", "field 'text' of dataset 'g/named' .* has dtype string"),
        ("g/table/at/y", "'g/table/at' .* has no field 'y': it has 'x', 'n', 'flag'"),
        ("g/table/id/x", "'g/table/id' .* has no field 'x': it has uint16 numbers, no fields"),
        ("g/plain/x", "'g/plain' is no group"),
    ]:
        with pytest.raises(DataError, match=message):
            hdf5(path, group)


def test_enums_are_their_numbers_and_bools_stay(tmp_path):
    path = tmp_path / "a.h5"
    kind = h5py.enum_dtype({"cat": 3, "dog": -2}, basetype="i2")
    with h5py.File(path, "w") as file:
        file.create_dataset("kind", data=np.array([3, -2, 3], "i2"), dtype=kind)
        file["truth"] = np.array([True, False, True])
        file.create_dataset("table", data=np.array([(3, True)] * 3, [("k", kind), ("b", "?")]))
    with hdf5(path) as source:
        batch = source.batch(3)(0)
    assert (batch["kind"].dtype, batch["kind"].tolist()) == (torch.int16, [3, -2, 3])
    assert (batch["truth"].dtype, batch["truth"].tolist()) == (torch.bool, [True, False, True])
    assert (batch["table"]["k"].tolist(), batch["table"]["b"].tolist()) == ([3, 3, 3], [True, True, True])


@pytest.mark.parametrize("chunks", [None, 4])
def test_elements_that_are_arrays_keep_their_dimensions(tmp_path, chunks):
    array = np.arange(N * 6).reshape(N, 2, 3).astype(">i2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (N,), np.dtype((">i2", (2, 3))), chunks=chunks)[...] = array
    with hdf5(tmp_path / "a.h5", "x") as source:
        assert np.array_equal(source.batch(N)(0), array)
        check_source(source)


# --- any axis, the first samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("storage", [{}, {"chunks": (3, 4, 2)}, {"chunks": (6, 7, 2), "compression": "lzf"}])
def test_samples_lie_along_any_axis(tmp_path, axis, storage):
    array = np.random.default_rng(0).normal(size=(6, 7, 8))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=array, **storage)
    rows = np.moveaxis(array, axis, 0)
    with hdf5(tmp_path / "a.h5", "x", axis=axis) as source:
        assert np.array_equal(source.batch(len(rows))(0), rows)
        assert np.array_equal(source.take(np.array([4, 0, 5]), 0), rows[[4, 0, 5]])
        check_source(source)


def test_datasets_have_axes_of_their_own(tmp_path):
    x, y = np.arange(12).reshape(3, 4), np.arange(4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = x, y
    with hdf5(tmp_path / "a.h5", axis={"x": -1}) as source:
        assert {name: leaf.tolist() for name, leaf in source(2).items()} == {"x": [2, 6, 10], "y": 2}
    for axis, message in [({"z": 1}, "axis names"), (True, "axis must be an int"), ({"x": 1.5}, "axis must be an int")]:
        with pytest.raises(ArgumentError, match=message):
            hdf5(tmp_path / "a.h5", axis=axis)
    with pytest.raises(ArgumentError, match=r"shape \(4,\): axis must lie in -1 … 0, got 1"):
        hdf5(tmp_path / "a.h5", axis=1)
    with pytest.raises(ArgumentError, match="axis takes an int"):
        hdf5(tmp_path / "a.h5", "x", axis={"x": 1})


def test_length_takes_the_first_samples(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(10), maxshape=(None,), chunks=(4,))
        file["y"] = np.arange(12)
    with pytest.raises(DataError, match=r"differ in length .*length="):
        hdf5(path)
    with hdf5(path, length=7) as source:
        assert [int(element["y"]) for element in source] == list(range(7))
        check_source(source)
    with pytest.raises(DataError, match=r"length=11 asks for more samples .*'x': 10, 'y': 12"):
        hdf5(path, length=11)
    with h5py.File(path, "r+") as file:
        file["x"].resize(20, 0)
        file["x"][10:] = np.arange(10, 20)
    with hdf5(path, "x", length=7) as again:
        assert len(again) == 7
    for wrong in (0, 2.0, True):
        with pytest.raises(ArgumentError, match="length must be"):
            hdf5(path, length=wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"threads": True}, "threads must be an int"),
        ({"memory": "much"}, "memory takes a number of bytes"),
        ({"unpack": 1}, "unpack takes True or False"),
        ({"swmr": "yes"}, "swmr takes True or False"),
        ({"root": 3}, "root takes the path of a folder"),
        ({"storage": ["cache"]}, "storage takes the options"),
        ({"group": 3}, "group takes the name"),
        ({"datasets": ()}, "datasets is empty"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_before_the_file_is_opened(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        hdf5("not there.h5", **arguments)


# --- sequences of variable length -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", ">f8", ">i2", "u1", POINT])
def test_sequences_have_their_own_lengths(tmp_path, dtype):
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    rows = [np.frombuffer(rng.integers(0, 2, n * dtype.itemsize, np.uint8).tobytes(), dtype) for n in rng.integers(0, 9, N)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (N,), h5py.vlen_dtype(dtype), chunks=(5,))
        for place, row in enumerate(rows):
            if len(row):
                file["x"][place] = row
        file["y"] = np.arange(N)
    with hdf5(tmp_path / "a.h5") as source:
        assert source.ragged
        for element, row, place in zip(source, rows, range(N), strict=True):
            check_same(element["x"], expected(row))
            assert int(element["y"]) == place
        for element, place in zip(source.elements(np.array([5, 1, 1]), 0), [5, 1, 1], strict=True):
            check_same(element["x"], expected(rows[place]))
        check_source(source)
        check_source(source.map(lambda element: element["y"]).shuffle(seed=0).batch(4))
        assert "variable-length" in str(source.explain())


def test_sequences_are_stacked_once_they_are_padded(tmp_path):
    rows = [np.arange(n, dtype="i4") for n in (3, 0, 5, 5)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.array(rows, dtype=object), dtype=h5py.vlen_dtype("i4"))
        file["y"] = np.arange(4)
    with hdf5(tmp_path / "a.h5") as source:
        with pytest.raises(TreeError, match=r"dataset 'x' has sequences of 0 … 5 numbers.*\.padded\(5\)"):
            source.batch(4)(0)
        assert source.take(np.array([2, 3]), 0)["x"].tolist() == [[0, 1, 2, 3, 4]] * 2
        elements, mask = source.padded(5, value=-1).batch(4)(0)
    assert elements["x"].tolist() == [[0, 1, 2, -1, -1], [-1] * 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert (elements["y"].tolist(), mask.sum(1).tolist()) == ([0, 1, 2, 3], [3, 0, 5, 5])


def test_several_sequences_to_a_sample_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (3, 2), h5py.vlen_dtype("i4"))
        file.create_dataset("table", (3,), np.dtype([("n", "i4"), ("s", h5py.vlen_dtype("i4"))]))
        file["table"][...] = 0, np.arange(2, dtype="i4")
    with pytest.raises(DataError, match=r"dataset 'x' in .* has shape \(3, 2\): sequences"):
        hdf5(tmp_path / "a.h5", "x")
    with pytest.raises(DataError, match=r"field 's' of dataset 'table' .* variable-length int32"):
        hdf5(tmp_path / "a.h5", "table")
    assert hdf5(tmp_path / "a.h5", "table/n").batch(3)(0).tolist() == [0, 0, 0]


# --- encoded images ----------------------------------------------------------------------------------------------


def encoded(image, form):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def decoded(data):
    from PIL import Image

    return np.array(Image.open(io.BytesIO(data.numpy().tobytes())))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("kind", ["sequences", "opaque"])
def test_encoded_images_are_decoded_by_a_function(tmp_path, form, kind):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), np.uint8)
    data = [encoded(image, form) for image in images]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if kind == "sequences":
            file.create_dataset("image", (6,), h5py.vlen_dtype("u1"))
            for place, row in enumerate(data):
                file["image"][place] = row
        else:
            size = max(map(len, data))
            whole = np.stack([np.pad(row, (0, size - len(row))) for row in data])
            file["image"] = whole.view(f"V{size}")[:, 0]
        file["label"] = np.arange(6)
    with hdf5(tmp_path / "a.h5") as source:
        assert source(0)["image"].dtype == torch.uint8
        batches = source.map(lambda element: {**element, "image": decoded(element["image"])}).shuffle(seed=0).batch(4)
        check_source(batches)
        for batch in batches:
            for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
                assert np.array_equal(image, decoded(torch.from_numpy(data[label].copy())))
                assert form != "PNG" or np.array_equal(image, images[label])


def test_a_table_with_text_is_read_by_the_fields_that_are_numbers(tmp_path):
    path = tmp_path / "table.h5"
    table = np.zeros(5, [("id", "i4"), ("name", "S8"), ("pos", "f4", (3,)), ("at", [("x", "f8"), ("label", "S2")])])
    table["id"], table["pos"] = np.arange(5), np.arange(15).reshape(5, 3)
    with h5py.File(path, "w") as file:
        file["table"], file["deep/table"], file["plain"] = table, table, np.zeros(5)
    for arguments, advice in [
        ({}, r"datasets=\['table/id', 'table/pos'\]"),
        ({"group": "table"}, r"datasets=\['id', 'pos'\]"),
        ({"group": "deep"}, r"datasets=\['table/id', 'table/pos'\]"),
        ({"group": "table/at"}, r"datasets=\['x'\]"),
    ]:
        with pytest.raises(DataError, match=f"field '(name|label)' of .* has dtype string.*{advice}"):
            hdf5(path, **arguments)
    with hdf5(path, group="table", datasets=["id", "pos"]) as source:
        assert {name: leaf.tolist() for name, leaf in source(2).items()} == {"id": 2, "pos": [6, 7, 8]}
        check_source(source.batch(2))
    with hdf5(path, group="deep/table/at", datasets=["x"]) as source:
        assert source(1).keys() == {"x"}
    with hdf5(path, datasets=["table/id", "table/pos"]) as source:
        assert source(2).keys() == {"table/id", "table/pos"}
    with pytest.raises(DataError, match="has no field 'nothing'"):
        hdf5(path, group="table", datasets=["nothing"])
    with pytest.raises(ArgumentError, match="is a dataset: give its group"):
        hdf5(path, group="plain", datasets=["x"])
    with pytest.raises(ArgumentError, match="axis takes an int"):
        hdf5(path, group="table", datasets=["id"], axis={"id": 0})
