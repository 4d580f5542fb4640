"""What once changed numbers, rows, groups or files without a word is now refused, or exact."""

import h5py
import numpy as np
import pytest
import torch

import functrain as ft
from functrain.core.errors import ArgumentError, DataError, PositionError, TreeError
from functrain.data.arguments import places
from functrain.data.budget import size_of
from functrain.data.labels import classes
from functrain.data.prefetch import prefetch

TEN = ft.arrays(torch.arange(10))


# --- dtypes of elements ------------------------------------------------------------------------------------------


def test_elements_of_different_dtypes_are_not_promoted():
    both = ft.source([2**40 + 1, 1.5])
    with pytest.raises(TreeError, match=r"float32 and int64.*\.map\(fn\)"):
        both.batch(2)(0)
    alike = both.map(lambda x: x.double()).batch(2)(0)
    assert alike.dtype == torch.float64
    assert alike.tolist() == [2**40 + 1, 1.5]


def test_a_leaf_of_another_dtype_is_found_in_a_tree():
    mapped = TEN.map(lambda x: {"x": x, "y": x.float() if x == 3 else x})
    assert mapped.batch(3)(0)["y"].tolist() == [0, 1, 2]
    with pytest.raises(TreeError, match="float32 and int64"):
        mapped.batch(3)(1)


# --- indices that a caller gives ---------------------------------------------------------------------------------


@pytest.fixture(params=[None, (4, 3)], ids=["contiguous", "chunked"])
def rows(request, tmp_path):
    data = np.arange(60, dtype=np.int64).reshape(20, 3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=data, chunks=request.param)
    with ft.hdf5(tmp_path / "a.h5", "x") as source:
        yield source, data


def sparse(folder):
    with h5py.File(folder / "s.h5", "w") as file:
        file["X/data"], file["X/indices"] = np.arange(1.0, 21.0), np.zeros(20, int)
        file["X/indptr"] = np.arange(21)
        file["X"].attrs.update({"encoding-type": "csr_matrix", "shape": [20, 2]})
    return ft.csr(folder / "s.h5", "X")


BAD = [
    (np.array([0, -1]), PositionError, "position -1 lies outside a source of length 20"),
    (np.array([20]), PositionError, "position 20 lies"),
    (np.array([2**64 - 1], np.uint64), PositionError, f"position {2**64 - 1} lies"),
    (np.array([0.0, 1.0]), ArgumentError, "ints .*got float64"),
    (np.array([True, False]), ArgumentError, "got bool"),
    (np.array([], np.int64), ArgumentError, r"at least one, got int64 of shape \(0,\)"),
    (np.array([[0, 1]]), ArgumentError, r"of shape \(1, 2\)"),
    (np.int64(3), ArgumentError, r"of shape \(\)"),
]


@pytest.mark.parametrize(("indices", "error", "message"), BAD)
def test_rows_are_not_read_beside_the_dataset(rows, tmp_path, indices, error, message):
    source, _ = rows
    for read in (source.take, source.elements):
        with pytest.raises(error, match=message):
            read(indices, 0)
    with sparse(tmp_path) as matrix, pytest.raises(error, match=message):
        matrix.take(indices, 0)
    words = ft.ragged(torch.arange(20), np.arange(21))
    for read in (words.take, words.elements):
        with pytest.raises(error, match=message):
            read(indices, 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
def test_indices_of_any_ints_read_the_same_rows(rows, tmp_path, dtype):
    source, data = rows
    wanted = np.array([19, 3, 3, 0], dtype)
    assert source.take(wanted, 0).tolist() == data[wanted].tolist()
    with sparse(tmp_path) as matrix:
        assert matrix.take(wanted, 0)[:, 0].tolist() == [20, 4, 4, 1]


def test_int32_indices_do_not_overflow(tmp_path):
    # 3 GiB that nobody stores: the file is sparse.
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        data = file.create_dataset("x", (3 * 2**10, 2**20), "u1")
        data[3000, 5] = 7
    with ft.hdf5(tmp_path / "wide.h5", "x") as source:
        assert int(source.take(np.array([3000], np.int32), 0)[0, 5]) == 7


def test_int64_indices_are_not_copied():
    given = np.arange(5)
    assert places(given, 5) is given


# --- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a", "b", float("nan")], r"1 of 4 elements have no label \(label 3 is nan\)"),
        (["a", None, "b", "b"], "label 1 is None"),
        ([1, "1", 1, 1], "of one kind: got int, str"),
        ([b"1", "1", "1", "1"], "got bytes, str"),
        ([True, 1, 0, 0], "got bool, int"),
        ([1, 1.0, 2, 2], "got int, float"),
        ([1j, 1, 2, 2], "got complex, int"),
        (np.array([1, "1", 2, 2], object), "got int, str"),
        (np.array(["a", np.nan, "b", "b"], object), "label 1 is nan"),
    ],
)
def test_labels_of_several_kinds_are_no_groups(labels, message):
    with pytest.raises(ArgumentError, match=message):
        classes(labels, 4)


@pytest.mark.parametrize(
    "labels",
    [
        [2**63, 2**63 + 1, -1, 2**63],
        ["a\0", "a", "b", "a\0"],
        [b"a\0", b"a", b"b", b"a"],
        ["ä", "z", "a", "z"],
        [False, True, True, False],
        [0.5, -1.0, 0.5, 2.0],
        (3, 1, 2, 1),
    ],
)
def test_labels_of_lists_are_what_python_takes_them_for(labels):
    names, numbers = classes(labels, 4)
    assert names.tolist() == sorted(set(labels))
    assert [names.tolist()[number] for number in numbers] == list(labels)


def test_labels_of_numpy_and_torch_in_a_list_are_numbers():
    for labels in ([np.int64(2), 1, np.uint8(2)], [torch.tensor(2), torch.tensor(1), torch.tensor(2)]):
        names, numbers = classes(labels, 3)
        assert (names.tolist(), numbers.tolist()) == ([1, 2], [1, 0, 1])


def test_lists_and_arrays_of_one_kind_are_split_alike():
    listed = [int(n) for n in np.random.default_rng(0).integers(-5, 5, 40)]
    source = ft.arrays(torch.arange(40))
    for given in (listed, [f"{n:+d}" for n in listed]):
        ways = [source.split(0.5, seed=3, groups=labels) for labels in (given, np.array(given), np.array(given, object))]
        assert len({tuple(tuple(int(x) for x in part) for part in parts) for parts in ways}) == 1


# --- virtual datasets --------------------------------------------------------------------------------------------


def write(path, data, name="x"):
    with h5py.File(path, "w") as file:
        file[name] = data
    return path


@pytest.mark.parametrize(("first", "second"), [("i8", "f8"), ("u8", "i4"), ("i8", "c16"), ("u8", "f4"), ("i8", "f2")])
def test_a_virtual_dataset_does_not_round(tmp_path, first, second):
    parts = [write(tmp_path / "a.h5", np.array([2**53 + 1], first)), write(tmp_path / "b.h5", np.array([1], second))]
    with pytest.raises(DataError, match=r"'/x' in .*a\.h5' is u?int64, of which .* does not hold all numbers"):
        ft.h5concat(tmp_path / "v.h5", parts, virtual=True, fill=0)
    assert not (tmp_path / "v.h5").exists()


@pytest.mark.parametrize(
    ("first", "second"), [("i4", "f8"), ("f4", "f8"), ("u2", "i8"), ("u1", "f4"), ("u4", "i4"), (">i8", "<i8")]
)
def test_a_virtual_dataset_of_dtypes_that_fit_is_exact(tmp_path, first, second):
    arrays = [np.array([np.iinfo(first).max if first[-2] in "iu" else 0.1], first), np.array([3], second)]
    parts = [write(tmp_path / f"{n}.h5", array) for n, array in enumerate(arrays)]
    ft.h5concat(tmp_path / "v.h5", parts, virtual=True, fill=0)
    with h5py.File(tmp_path / "v.h5") as file:
        assert file["x"][...].tolist() == [arrays[0][0].item(), 3]


def shards(folder):
    return [write(folder / f"s{n}.h5", np.full(3, n)) for n in range(3)]


@pytest.mark.parametrize("levels", [1, 2])
def test_a_virtual_dataset_does_not_replace_what_it_refers_to(tmp_path, levels):
    sources = shards(tmp_path)
    for level in range(levels):
        ft.h5concat(tmp_path / f"v{level}.h5", sources if not level else [tmp_path / f"v{level - 1}.h5"], virtual=True)
    before = sources[2].read_bytes()
    with pytest.raises(ArgumentError, match=r"s2\.h5' holds data that a virtual source refers to"):
        ft.h5concat(sources[2], [tmp_path / f"v{levels - 1}.h5"], virtual=True, overwrite=True)
    (tmp_path / "link.h5").symlink_to(sources[2])
    with pytest.raises(ArgumentError, match="refers to"):
        ft.h5concat(tmp_path / "link.h5", [tmp_path / f"v{levels - 1}.h5"], virtual=True, overwrite=True)
    assert sources[2].read_bytes() == before
    other = write(tmp_path / "other.h5", np.zeros(1))
    ft.h5concat(other, [tmp_path / f"v{levels - 1}.h5"], virtual=True, overwrite=True)
    with h5py.File(other) as file:
        assert file["x"][...].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# --- numbers of NumPy, and huge ones -----------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    assert (size_of("within", np.int64(7)), ft.Budget(np.uint16(9)).limit) == (7, 9)
    assert [int(x) for x in TEN.shuffle(0, within=np.int64(64))] == [int(x) for x in TEN.shuffle(0, within=64)]
    with prefetch(TEN, depth=np.int64(2), workers=np.int32(2)) as loaded:
        assert [int(x) for x in loaded] == list(range(10))
    assert [len(part) for part in TEN.split(np.float32(0.5))] == [5, 5]
    weights = [np.float32(0.5), np.int64(2)]
    drawn = [[int(x) for x in ft.mix([TEN, TEN], given, seed=0)] for given in (weights, [0.5, 2])]
    assert drawn[0] == drawn[1]
    words = ft.ragged(torch.arange(3), [0, 1, 3])
    for value in (np.int64(-1), np.float32(-1), np.uint8(1)):
        assert words.padded(2, value=value)(0)[0].tolist() == [0, int(value)]
    assert len(TEN.poisson(np.float32(0.5), seed=0)) == 2


@pytest.mark.parametrize("given", ["9" * 400 + " GiB", "9" * 5000, "1" + "0" * 19, 2**63, "9999999999999 GiB"])
def test_sizes_beyond_all_memory_are_refused(given):
    with pytest.raises(ArgumentError, match="memory takes a number of bytes"):
        size_of("memory", given)


def test_sizes_in_words_are_exact():
    assert size_of("memory", "9007199254740993") == 2**53 + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: TEN.shard(0, 2**65),
        lambda: TEN.windows(2, 2**65),
        lambda: TEN.batch(2**63),
        lambda: TEN.epoch(2**70),
        lambda: TEN.repeat(2**63),
    ],
)
def test_counts_that_no_int64_holds_are_refused(make):
    with pytest.raises(ArgumentError, match="must be below 2⁶³, got"):
        make()


LABELS = [0] * 7 + [1] * 3


@pytest.mark.parametrize(
    "read",
    [
        lambda: TEN.balanced(LABELS).epoch(2**62)(0),
        lambda: ft.mix([TEN, TEN]).epoch(2**62)(0),
        lambda: TEN.poisson(0.1, seed=0).epoch(2**62)(0),
        lambda: TEN.repeat().batch(2)(2**62),
        lambda: TEN.repeat().batch(2).batch(2)(2**62 - 1),
        lambda: TEN.repeat().shard(1, 2**62)(2),
        lambda: TEN.repeat()(2**63),
        lambda: TEN.repeat(2**62)(2**63),
        lambda: TEN.repeat()[2**70],
        lambda: TEN.repeat().__getitems__([2**63]),
        lambda: ft.sampled(lambda keys: {"x": keys}, 5)(2**70),
    ],
)
def test_positions_that_no_int64_holds_are_outside(read):
    with pytest.raises(PositionError, match="2⁶³"):
        read()


def test_the_last_positions_are_read():
    last = 2**63 - 1
    assert int(TEN.repeat()(last)) == last % 10
    assert TEN.repeat().batch(2)(2**62 - 2).tolist() == [(last - 3) % 10, (last - 2) % 10]
    assert int(TEN.repeat().shard(1, 2**62)(1)) == (2**62 + 1) % 10
    for ordered in (TEN.weighted(range(1, 11), seed=0), TEN.shuffle(0)):
        assert 0 <= int(ordered.epoch(last)(0)) < 10
    for mixed in (TEN.balanced(LABELS), ft.mix([TEN, TEN])):
        assert 0 <= int(mixed.epoch(2**63 // len(mixed) - 1)(0)) < 10


def test_seeds_are_any_ints():
    assert sorted(int(x) for x in TEN.shuffle(2**70)) == list(range(10))
