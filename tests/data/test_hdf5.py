"""HDF5 sources: every layout reads as h5py reads it, by the way that explain() says, or is refused with a reason."""

import gc
import multiprocessing
import os
import threading

import h5py
import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError, DataError
from functrain.data import h5write, hdf5, readmmap

DTYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
INDICES = [[0], [3, 4, 5, 6], [29], [28, 3, 3, 17], [5, 4, 3], list(range(30)), [0, 29]]


def values(dtype):
    return (np.arange(30 * 6).reshape(30, 2, 3) % 120).astype(dtype)


def check_reads(source, array):
    assert len(source) == len(array)
    for indices in INDICES:
        taken = source.take(np.array(indices), 0)
        assert np.array_equal(taken.numpy(), array[indices].astype(array.dtype.newbyteorder("=")))
    assert np.array_equal(source(7).numpy(), array[7])
    taken.zero_()
    assert np.array_equal(source(29).numpy(), array[29])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_byte_order(tmp_path, dtype, order):
    array = values(np.dtype(dtype).newbyteorder(order))
    h5write(tmp_path / "a.h5", {"x": array})
    source = hdf5(tmp_path / "a.h5", "x")
    check_reads(source, array)
    assert "mmap" in str(source.explain())
    assert source(0).dtype == torch.from_numpy(values(np.dtype(dtype).newbyteorder("="))).dtype


def build(name, file, folder):
    array = values("f4")
    if name == "contiguous":
        file["x"] = array
    elif name == "odd offset":
        file["before"] = np.zeros(3, "u1")
        file["x"] = array
    elif name == "chunked":
        file.create_dataset("x", data=array, chunks=(7, 2, 2))
    elif name == "gzip":
        file.create_dataset("x", data=array, chunks=(8, 2, 3), compression="gzip", shuffle=True, fletcher32=True)
    elif name == "chunks of rows":
        file.create_dataset("x", data=array, chunks=(7, 2, 3))
    elif name == "scaleoffset":
        array = np.arange(array.size).reshape(array.shape)
        file.create_dataset("x", data=array, chunks=(7, 2, 3), scaleoffset=0)
    elif name == "lzf":
        file.create_dataset("x", data=array, compression="lzf")
    elif name == "compact":
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(array.shape)
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, array)
    elif name == "unallocated":
        file.create_dataset("x", array.shape, "f4", fillvalue=3)
        array = np.full_like(array, 3)
    elif name == "external":
        (folder / "raw.bin").write_bytes(array.tobytes())
        file.create_dataset("x", array.shape, "f4", external=[(str(folder / "raw.bin"), 0, array.nbytes)])
    elif name == "virtual":
        h5write(folder / "part.h5", {"x": array})
        layout = h5py.VirtualLayout(array.shape, "f4")
        layout[:] = h5py.VirtualSource(str(folder / "part.h5"), "x", array.shape)
        file.create_virtual_dataset("x", layout)
    elif name == "external link":
        h5write(folder / "other.h5", {"padding": np.zeros(99), "y": array})
        file["x"] = h5py.ExternalLink(str(folder / "other.h5"), "y")
    elif name == "external link to chunks":
        h5write(folder / "other.h5", {"y": array}, chunks=7)
        file["x"] = h5py.ExternalLink(str(folder / "other.h5"), "y")
    elif name == "soft link":
        file["y"] = array
        file["x"] = h5py.SoftLink("/y")
    elif name == "bfloat16":
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)
        kind.set_size(2)
        kind.set_ebias(127)
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple(array.shape))
        file["x"][...] = array
    return array


WAYS = {
    "contiguous": "mmap: contiguous",
    "odd offset": "mmap: contiguous",
    "soft link": "mmap: contiguous",
    "chunked": "direct: chunked 7x2x2, one element lies in 2 chunks, with no filter, decoded outside HDF5's lock",
    "chunks of rows": "mmap: chunked 7x2x3 with no filter, mapped into memory",
    "gzip": "direct: chunked 8x2x3 with shuffle+gzip+fletcher32, decoded",
    "lzf": "with lzf, decoded",
    "scaleoffset": "with scaleoffset: read through h5py",
    "compact": "h5py: compact",
    "unallocated": "h5py: not allocated",
    "external": "h5py: stored in an external file",
    "virtual": "h5py: virtual",
    "external link": "mmap: contiguous, mapped into memory from '",
    "external link to chunks": "mmap: chunked 7x2x3",
    "bfloat16": "h5py: stored in a number format that NumPy does not have",
}


@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("name", WAYS)
def test_every_layout_is_read_by_its_way(tmp_path, name, userblock):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", userblock_size=userblock) as file:
        array = build(name, file, tmp_path)
    with hdf5(path, "x") as source:
        check_reads(source, array)
        assert WAYS[name] in str(source.explain())
    if "mmap: contiguous" in WAYS[name]:
        mapped = readmmap(path, "x")
        assert isinstance(mapped, np.memmap)
        assert not mapped.flags.writeable
        assert np.array_equal(mapped, array)
    else:
        with pytest.raises(DataError, match="cannot be memory-mapped"):
            readmmap(path, "x")


def test_groups_and_datasets_are_chosen(tmp_path):
    h5write(
        tmp_path / "a.h5",
        {"train": {"x": np.zeros((4, 2)), "y": np.arange(4), "deep": {"z": np.ones(4)}}, "w": np.ones(4)},
    )
    assert list(hdf5(tmp_path / "a.h5")(0)) == ["w"]
    assert sorted(hdf5(tmp_path / "a.h5", "/train/")(0)) == ["x", "y"]
    assert list(hdf5(tmp_path / "a.h5", "train", datasets=["y"])(0)) == ["y"]
    assert int(hdf5(tmp_path / "a.h5", "train/y")(3)) == 3
    assert list(hdf5(tmp_path / "a.h5", "train", datasets=["deep/z"])(0)) == ["deep/z"]


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("strings", h5py.string_dtype(), "string"),
        ("fixed", "S5", "string"),
        ("time", h5py.opaque_dtype("M8[s]"), "datetime64"),
        ("pairs", h5py.vlen_dtype(np.dtype([("a", "i4"), ("b", "S2")])), "string"),
        ("reference", h5py.ref_dtype, "reference"),
        ("long", np.longdouble, "float128"),
    ],
)
def test_dtypes_that_no_tensor_holds_are_refused(tmp_path, name, dtype, kind):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(f"train/{name}", (3,), dtype)
        file["train/y"] = np.arange(3)
    with pytest.raises(DataError, match=f"dataset 'train/{name}' in '{path}' has dtype.*({kind}).*datasets="):
        hdf5(path, "train")
    assert int(hdf5(path, "train", datasets=["y"])(2)["y"]) == 2


def test_what_is_missing_or_not_to_be_read_is_named(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["train/x"] = np.zeros((4, 2))
        file["train/short"] = np.zeros(3)
        file["odd/scalar"] = file["beside/rate"] = 3
        file["beside/x"] = np.zeros(4)
        for name, size in {"data": 5, "indices": 5, "indptr": 4}.items():
            file[f"matrix/{name}"] = np.zeros(size)
        file["odd/none"] = np.zeros((0, 3))
        file["odd/null"] = h5py.Empty("f4")
        file["odd/dangling"] = h5py.SoftLink("/nowhere")
    for arguments, message in [
        ({"group": "test"}, "has no 'test': '/' holds 'beside', 'matrix', 'odd', 'train'"),
        ({"group": "train/z"}, "has no 'train/z': 'train' holds 'short', 'x'"),
        ({"group": "no/where"}, "has no 'no/where'"),
        ({"group": "odd/dangling"}, "leads nowhere"),
        ({"group": "train", "datasets": ["z"]}, "'train' holds 'short', 'x'"),
        ({"datasets": ["train"]}, "is a group, not a dataset: it holds 'short', 'x'"),
        ({}, "holds no datasets, but 'beside', 'matrix', 'odd', 'train': name a group"),
        ({"group": "train"}, "differ in length ('train/short': 3, 'train/x': 4)"),
        ({"group": "odd/scalar"}, "is a scalar"),
        ({"group": "beside"}, "is a scalar: expected shape (N, …); choose others with datasets=[…]"),
        ({"group": "matrix"}, f"a sparse matrix is read by functrain.csr({str(path)!r}, 'matrix')"),
        ({"group": "train"}, "with offsets, by functrain.ragged"),
        ({"group": "odd/null"}, "is empty"),
        ({"group": "odd/none"}, "no samples: its shape is (0, 3)"),
    ]:
        with pytest.raises(DataError) as caught:
            hdf5(path, **arguments)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
    for arguments, message in [
        ({"datasets": "x"}, "datasets=['x']"),
        ({"group": "train/x", "datasets": ["x"]}, "is a dataset"),
        ({"group": "train", "datasets": []}, "datasets is empty"),
    ]:
        with pytest.raises(ArgumentError) as wrong:
            hdf5(path, **arguments)
        assert message in str(wrong.value)
    with pytest.raises(DataError, match="is a group"):
        readmmap(path, "train")


def shelf(folder, chunks):
    """main.h5, with a group of its own called as the one in other.h5 that it links to."""
    h5write(folder / "other.h5", {"data": {"x": np.full((4, 2), 7.0), "y": np.arange(4)}}, chunks=chunks)
    h5write(folder / "main.h5", {"data": {"x": np.full((4, 2), 1.0), "y": np.arange(100, 104)}}, chunks=chunks)
    with h5py.File(folder / "main.h5", "r+") as file:
        file["train"] = h5py.ExternalLink("other.h5", "/data")
        file["here"] = h5py.SoftLink("/data")
    return folder / "main.h5"


@pytest.mark.parametrize("chunks", [None, 2])
@pytest.mark.parametrize("datasets", [None, ["x", "y"], ["y", "x"]])
def test_a_linked_group_is_read_where_the_link_leads(tmp_path, chunks, datasets):
    path = shelf(tmp_path, chunks)
    with hdf5(path, "train", datasets=datasets) as there, hdf5(path, "/here/", datasets=datasets) as here:
        assert [(float(e["x"][1]), int(e["y"])) for e in there] == [(7.0, n) for n in range(4)]
        assert [(float(e["x"][1]), int(e["y"])) for e in here] == [(1.0, 100 + n) for n in range(4)]
    if chunks is None:
        assert readmmap(path, "train/y").tolist() == [0, 1, 2, 3]
        os.truncate(tmp_path / "other.h5", 2000)
        with pytest.raises(DataError, match=r"other\.h5' is truncated"):
            hdf5(path, "train")


@pytest.mark.parametrize("link", [h5py.SoftLink("/nowhere"), h5py.ExternalLink("nowhere.h5", "/y")])
def test_a_member_that_cannot_be_opened_is_not_left_out(tmp_path, link):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["g/x"] = np.arange(4)
        file["g/y"] = link
        file["g/deeper/z"] = np.arange(3)
        file["g/kind"] = np.dtype("f4")
    with pytest.raises(DataError, match=rf"'g/y' in '{path}' cannot be opened.*datasets=\["):
        hdf5(path, "g")
    assert hdf5(path, "g", datasets=["x"])(3) == {"x": torch.tensor(3)}
    for arguments in ({"group": "g", "datasets": ["kind"]}, {"group": "g/kind"}):
        with pytest.raises(DataError, match=r"datatype|no datasets"):
            hdf5(path, **arguments)


def test_names_that_hdf5_has_not_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    h5write(path, {"a": np.arange(4)})
    ways = (lambda name: hdf5(path, name), lambda name: hdf5(path, datasets=[name]), lambda name: readmmap(path, name))
    for name in ("a\0x", "\ud800", "a/b"):
        for read in ways:
            with pytest.raises(DataError, match=r"holds 'a'|'a' is no group"):
                read(name)
    for name in (5, b"a"):
        with pytest.raises(ArgumentError, match="group takes the name"):
            hdf5(path, name)
        for datasets in (name, [name]):
            with pytest.raises(ArgumentError, match="datasets takes a list of names, got"):
                hdf5(path, datasets=datasets)


def test_files_that_are_not_there_or_not_hdf5(tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5 " * 100)
    (tmp_path / "empty.h5").touch()
    for name, message in [
        ("gone.h5", "no file"),
        ("text.h5", "not an HDF5 file"),
        ("empty.h5", "not an HDF5 file"),
        ("", "directory"),
    ]:
        for open_it in (hdf5, lambda path: readmmap(path, "x")):
            with pytest.raises(DataError, match=message):
                open_it(str(tmp_path / name))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("chunks", [None, 10])
def test_a_truncated_file_is_refused(tmp_path, keep, chunks):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.zeros((100, 100))}, chunks=chunks)
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(DataError, match="truncated"):
        hdf5(path)


def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.ones((1000, 100))})
    source = hdf5(path).shuffle(0).batch(10)
    source(0)
    os.truncate(path, 8192)
    for read in (lambda: source(0), lambda: source.inner[0](999)):
        with pytest.raises(DataError, match=r"shrank to 8192 bytes.*'x'"):
            read()


def test_a_damaged_chunk_names_file_and_dataset(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(1000.0), chunks=(100,), fletcher32=True)
    with h5py.File(path) as file:
        offset = file["x"].id.get_chunk_info(3).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(offset)
        # Not ff ff over 00 00, which are the same to a Fletcher checksum.
        raw.write(b"\x12\x34")
    with hdf5(path) as source:
        assert float(source(99)["x"]) == 99.0
        with pytest.raises(DataError, match=rf"dataset 'x' in '{path}' is damaged: chunk \(3,\), 804 bytes from byte {offset}"):
            source(350)


def test_a_replaced_file_does_not_disturb_a_reader(tmp_path):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.zeros(1000)})
    source = hdf5(path)
    h5write(path, {"x": np.ones(10)}, overwrite=True)
    assert float(source(999)["x"]) == 0.0
    assert float(hdf5(path)(9)["x"]) == 1.0


@pytest.mark.parametrize("chunks", [None, 10])
def test_closing_ends_reading_and_lets_go_of_the_file(tmp_path, chunks):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.arange(100)}, chunks=chunks)
    with hdf5(path) as source:
        batches = source.batch(10)
        batches(3)
    source.close()
    for read in (lambda: source(0), lambda: batches(0)):
        with pytest.raises(DataError, match="was closed"):
            read()
    with h5py.File(path, "r+") as file:
        file["x"][0] = 5


def test_a_source_that_is_forgotten_lets_go_of_the_file(tmp_path):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.arange(100)}, chunks=10)
    source = hdf5(path)
    source(0)
    with pytest.raises(OSError, match="open"):
        h5py.File(path, "r+")
    del source
    gc.collect()
    with h5py.File(path, "r+") as file:
        assert len(file["x"]) == 100


def read_in_child(source, answer):
    answer.put(source.batch(10)(2)["x"].tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("chunks", [None, 10])
def test_a_source_is_read_on_both_sides_of_a_fork(tmp_path, chunks):
    h5write(tmp_path / "a.h5", {"x": np.arange(100)}, chunks=chunks)
    source = hdf5(tmp_path / "a.h5")
    source(0)
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=read_in_child, args=(source, answer))
    child.start()
    assert answer.get() == list(range(20, 30))
    child.join()
    assert child.exitcode == 0
    assert source.batch(10)(2)["x"].tolist() == list(range(20, 30))


def test_many_threads_read_one_source(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.arange(1000)}, chunks=10, compression="gzip")
    source = hdf5(tmp_path / "a.h5").shuffle(0).batch(20)
    expected = [source(i)["x"].tolist() for i in range(50)]
    source = hdf5(tmp_path / "a.h5").shuffle(0).batch(20)
    wrong = []

    def read(offset):
        for i in range(50):
            place = (i * 7 + offset) % 50
            if source(place)["x"].tolist() != expected[place]:
                wrong.append(place)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_batch_of_many_scattered_rows_is_right(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.arange(20_000)}, chunks=1000)
    source = hdf5(tmp_path / "a.h5", "x")
    indices = np.random.default_rng(0).integers(0, 20_000, 3000)
    assert source.take(indices, 0).tolist() == indices.tolist()
