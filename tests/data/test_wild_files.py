"""Files as they are met: written by PyTables, netCDF4, anndata, MATLAB's and Keras' manner, and HDF5's traps one by one."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from h5files import Dataset, File, writing

import functrain as ft
from functrain.core.errors import DataError
from functrain.data import h5write, hdf5, readmmap

WAY = re.compile(r", (mmap|direct|h5py): ")


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """By library: a file that it wrote, and what it reads there itself."""
    folder = tmp_path_factory.mktemp("wild")
    script = Path(__file__).with_name("wild.py")
    libraries = ("pytables", "netcdf", "anndata")
    commands = [[sys.executable, str(script), library, str(folder / f"{library}.h5")] for library in libraries]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]
    for process in running:
        assert process.wait() == 0, process.stdout.read()
        process.stdout.close()
    files = {}
    for library in libraries:
        with np.load(folder / f"{library}.h5.npz") as arrays:
            files[library] = folder / f"{library}.h5", {name.replace("|", "/"): array for name, array in arrays.items()}
    return files


def way(source):
    """By which way a bare source reads."""
    return WAY.search(source.facts()["elements"])[1]


def check_reads(source, array):
    """Every row, a batch out of order, and single ones, bit for bit."""
    native = np.array(array, array.dtype.newbyteorder("="), order="C")
    indices = np.array([*range(len(array))[::-1], 0, len(array) // 2, 0])
    for places in (np.arange(len(array)), indices):
        taken = source.take(places, 0).numpy()
        assert taken.dtype == native.dtype
        assert taken.tobytes() == native[places].tobytes()
    assert source(len(array) - 1).numpy().tobytes() == native[-1].tobytes()


def check_bzip2(path, name, array):
    """By h5py, if another test has brought it the filter; else an error that says what would."""
    if h5py.h5z.filter_avail(307):
        check_reads(hdf5(path, name), array)
    else:
        with pytest.raises(DataError, match=r"bzip2.*pip install hdf5plugin"):
            hdf5(path, name)(0)


# --- other libraries -------------------------------------------------------------------------------------------------


def test_pytables(wild):
    path, arrays = wild["pytables"]
    assert len(arrays) > 20
    for name, array in arrays.items():
        if "bzip2" in name:
            check_bzip2(path, name, array)
            continue
        with hdf5(path, name, threads=2) as source:
            # Its booleans are fields of 8 bits, of which h5py makes bytes.
            check_reads(source, array.view("u1") if name == "flags" else array)
            direct = name.startswith(("zlib", "blosc"))
            assert way(source) == ("direct" if direct else "h5py" if name == "flags" or "table" in name else "mmap"), name
    with hdf5(path, datasets=["table/x", "table/n"]) as source:
        assert torch.equal(source(7)["table/x"], torch.from_numpy(arrays["table/x"][7]))
        assert int(source(7)["table/n"]) == 7
    with pytest.raises(DataError, match=r"field 'name' of dataset 'table' .* string"):
        hdf5(path, "table")
    with hdf5(path, "sequences") as source:
        assert [source(i).tolist() for i in (0, 3, 49)] == [[], [3000, 3001, 3002], list(range(49000, 49049))]


def test_netcdf(wild):
    path, arrays = wild["netcdf"]
    for name in arrays.keys() - {"deep/packed unpacked", "bzip2"}:
        with hdf5(path, name) as source:
            check_reads(source, arrays[name])
            assert way(source) == {"szip": "h5py", "contiguous": "mmap", "plain": "mmap", "time": "mmap"}.get(name, "direct")
    with hdf5(path, "deep", unpack=True) as source:
        theirs, ours = arrays["deep/packed unpacked"], source.batch(50)(0)["packed"].numpy()
        assert ours.dtype == np.float32
        assert np.isnan(theirs).any()
        assert np.array_equal(ours, theirs, equal_nan=True)
    with hdf5(path, "deep") as source:
        assert "unpack=True" in str(source.explain())
    # A dimension without a variable is a dataset that was never written.
    assert hdf5(path, "lat")(0).tolist() == 0
    check_bzip2(path, "bzip2", arrays["bzip2"])


def test_anndata(wild):
    path, arrays = wild["anndata"]
    for name in ("X", "obsm/umap", "obs/size", "obs/kind/codes"):
        with hdf5(path, name) as source:
            check_reads(source, arrays[name])
            assert way(source) == "direct"
    with ft.csr(path, "layers/sparse") as sparse:
        check_reads(sparse, arrays["layers/sparse"])
    with pytest.raises(DataError, match="string"):
        hdf5(path, "obs")


def test_matlab_7_3(tmp_path):
    """Column-major behind a user block: X(F, N) of theirs is a dataset (N, F), X(N, F) is (F, N)."""
    path = tmp_path / "data.mat"
    x = np.arange(20 * 3 * 4.0).reshape(20, 3, 4)
    with h5py.File(path, "w", userblock_size=512) as file:
        mask = (x[:, 0] > 9).astype("u1")
        for name, array, chunks in [("x", x.T, (4, 3, 7)), ("mask", mask.T, None), ("y", x[:, :1, 0].T, None)]:
            options = {"chunks": chunks, "compression": "gzip", "compression_opts": 3} if chunks else {}
            file.create_dataset(name, data=array, **options).attrs["MATLAB_class"] = np.bytes_("double")
        file["cells"] = np.array([[file["x"].ref]], dtype=h5py.ref_dtype)
        file["#refs#/a"] = np.zeros(2)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(508) + b"\0\2IM")
    with hdf5(path, datasets=["x", "mask", "y"], axis=-1) as source:
        assert len(source) == 20
        batch = source.take(np.array([19, 0, 7]), 0)
        assert torch.equal(batch["x"], torch.from_numpy(x.transpose(0, 2, 1)[[19, 0, 7]].copy()))
        assert torch.equal(batch["mask"], torch.from_numpy(mask[[19, 0, 7]]))
        assert torch.equal(batch["y"], torch.from_numpy(x[[19, 0, 7], :1, 0]))
    with pytest.raises(DataError, match="reference"):
        hdf5(path, "cells")


def test_weights_in_keras_manner(tmp_path):
    path = tmp_path / "model.weights.h5"
    kernel = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        group = file.create_group("model_weights/dense/dense")
        group["kernel:0"], group["bias:0"] = kernel, np.zeros(4, "f4")
        file["optimizer/step"] = np.int64(7)
    check_reads(hdf5(path, "model_weights/dense/dense/kernel:0"), kernel)
    with pytest.raises(DataError, match="differ in length"):
        hdf5(path, "model_weights/dense/dense")
    with pytest.raises(DataError, match="is a scalar"):
        hdf5(path, "optimizer")


def test_encoded_frames_of_variable_length(tmp_path):
    """As ImageNet in HDF5: each sample the bytes of a file, decoded by a function."""
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 255, (2, 3 + n % 3)).astype("u1") for n in range(30)]
    path = tmp_path / "frames.h5"
    with h5py.File(path, "w") as file:
        frames = file.create_dataset("frames", (30,), h5py.vlen_dtype("u1"), chunks=(8,))
        for n, image in enumerate(images):
            encoded = io.BytesIO()
            np.save(encoded, image)
            frames[n] = np.frombuffer(encoded.getvalue(), "u1")
        file["labels"] = np.arange(30)
    with hdf5(path) as source:
        decoded = source.map(lambda e: {**e, "frames": torch.from_numpy(np.load(io.BytesIO(e["frames"].numpy().tobytes())))})
        for n in (0, 29, 4, 5, 4):
            assert torch.equal(decoded(n)["frames"], torch.from_numpy(images[n]))
            assert int(decoded(n)["labels"]) == n
        assert "h5py: of variable length" in source.facts()["frames"]


def test_a_dataset_laid_out_as_h5py_guesses(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (70, 96, 96, 3)).astype("u1")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=images, chunks=(32, 12, 12, 1), compression="lzf")
    with hdf5(tmp_path / "a.h5", "x", threads=2) as source:
        check_reads(source, images)
        assert "direct: chunked 32x12x12x1, one element lies in 192 chunks" in str(source.explain())


# --- traps, one by one -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer():
    with writing() as process:
        yield process


TRAPS = {
    "edge chunks are stored whole": ("direct", {"chunks": (4, 4), "filters": (("deflate", (4,)),)}),
    "edge chunks may be stored without filters": (
        "direct",
        {"chunks": (4, 4), "filters": (("shuffle", ()), ("deflate", (4,)), ("fletcher32", ())), "whole_edges": False},
    ),
    "shuffled, with edges that are not": ("direct", {"chunks": (4, 4), "filters": (("shuffle", ()),), "whole_edges": False}),
    "a chunk may skip its filters": ("direct", {"chunks": (4, 4), "filters": (("lzf", ()),), "unfiltered": True}),
    "what was never written is the fill value": (
        "direct",
        {"chunks": (2, 2), "filters": (("lzf", ()),), "written": "part", "fill": 1},
    ),
    "nothing was ever written": ("direct", {"chunks": (4, 4), "filters": (("lzf", ()),), "written": "none", "fill": 1}),
    "contiguous, never written": ("h5py", {"layout": "contiguous", "written": "none", "fill": 1}),
    "external, with an offset": ("h5py", {"layout": "external"}),
    "compact": ("h5py", {"layout": "compact"}),
    "virtual": ("h5py", {"layout": "virtual", "fill": 1, "written": "part"}),
    "at an odd offset": ("mmap", {"layout": "contiguous", "before": 3}),
    "plain chunks at odd offsets": ("mmap", {"chunks": (4, 7), "before": 3}),
    "big-endian": ("mmap", {"layout": "contiguous", "dtype": ">f8"}),
    "big-endian chunks": ("direct", {"chunks": (3, 7), "dtype": ">f8", "filters": (("shuffle", ()), ("deflate", (1,)))}),
    "shrunk, and grown again": (
        "direct",
        {"chunks": (4, 4), "maxshape": (None, None), "steps": ((20, 20), (3, 2)), "filters": (("deflate", (1,)),), "fill": 1},
    ),
    "chunks larger than the dataset": (
        "direct",
        {"chunks": (30, 9), "maxshape": (None, None), "filters": (("deflate", (1,)),)},
    ),
    "the second axis alone is endless, edges unfiltered": (
        "h5py",
        {"chunks": (4, 4), "maxshape": (20, None), "filters": (("deflate", (1,)),), "whole_edges": False},
    ),
    "szip": ("h5py", {"chunks": (4, 4), "filters": (("szip", (32, 4)),)}),
    "n-bit": ("h5py", {"chunks": (4, 4), "filters": (("nbit", ()),)}),
    "scale-offset": ("h5py", {"chunks": (4, 4), "filters": (("scaleoffset", (2, 0)),)}),
}


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("trap", TRAPS)
def test_trap(tmp_path, writer, trap, libver):
    expected, given = TRAPS[trap]
    item = Dataset(**{"shape": (11, 7), "dtype": "<i4", "layout": "chunked", "content": "levels", **given})
    array = writer.write(tmp_path / "a.h5", File((item,), libver=libver, userblock=512))["0"]
    with hdf5(tmp_path / "a.h5", "0") as source:
        check_reads(source, array)
        assert way(source) == expected
    if expected != "mmap" or item.layout == "chunked":
        with pytest.raises(DataError, match="cannot be memory-mapped"):
            readmmap(tmp_path / "a.h5", "0")
    else:
        assert readmmap(tmp_path / "a.h5", "0").tobytes() == array.tobytes()


@pytest.mark.parametrize(("libver", "expected"), [("earliest", "direct"), ("latest", "h5py")])
def test_trap_the_second_axis_alone_is_endless(tmp_path, writer, libver, expected):
    """HDF5 2.0 lists such chunks at wrong places, but for those that it finds by the old B-tree."""
    item = Dataset((11, 7), "<i4", "chunked", (4, 4), maxshape=(20, None), filters=(("deflate", (1,)),))
    array = writer.write(tmp_path / "a.h5", File((item,), libver=libver, userblock=512, ordered=True))["0"]
    with hdf5(tmp_path / "a.h5", "0") as source:
        check_reads(source, array)
        assert way(source) == expected


def test_trap_edges_that_are_not_shuffled_and_look_the_same_at_first(tmp_path, writer):
    """The edge that is tried at open is all fill; another one would come out wrong."""
    given = {"filters": (("shuffle", ()),), "whole_edges": False, "allocated": "EARLY", "written": "none"}
    item = Dataset((11, 6), "<i4", "chunked", (4, 3), **given)
    writer.write(tmp_path / "a.h5", File((item,)))
    array = np.arange(66, dtype="i4").reshape(11, 6)
    array[8:, 3:] = 0
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["0"][...] = array
    check_reads(hdf5(tmp_path / "a.h5", "0"), array)


def test_trap_sequences_have_an_offset_but_no_numbers_there(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (5,), h5py.vlen_dtype("i4"))
        for n in range(5):
            file["x"][n] = np.arange(n)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"].id.get_offset() is not None
    with pytest.raises(DataError, match=r"cannot be memory-mapped\. It is of variable length"):
        readmmap(tmp_path / "a.h5", "x")
    with hdf5(tmp_path / "a.h5", "x") as source:
        assert [row.tolist() for row in source] == [list(range(n)) for n in range(5)]


def test_trap_a_number_of_fewer_bits_than_its_bytes(tmp_path):
    """HDF5 knows integers of 12 bits at an offset in 2 bytes: the dtype says int16, the bytes do not."""
    kind = h5py.h5t.STD_I16LE.copy()
    kind.set_precision(12)
    kind.set_offset(4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((6,)))
        file["x"][...] = [-2048, -1, 0, 1, 77, 2047]
    with hdf5(tmp_path / "a.h5", "x") as source:
        assert source.batch(6)(0).tolist() == [-2048, -1, 0, 1, 77, 2047]
        assert way(source) == "h5py"


def test_trap_a_source_of_a_virtual_dataset_is_missing(tmp_path):
    """HDF5 would read fill values, as if they were data."""
    for n in range(2):
        h5write(tmp_path / f"{n}.h5", {"x": np.full((3, 2), n + 1)})
    layout = h5py.VirtualLayout((6, 2), "i8")
    for n in range(2):
        layout[3 * n : 3 * n + 3] = h5py.VirtualSource(f"{n}.h5", "x", (3, 2))
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    with hdf5(tmp_path / "all.h5", "x") as source:
        assert source.batch(6)(0)[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    os.unlink(tmp_path / "1.h5")
    with pytest.raises(DataError, match=r"'1\.h5'"):
        hdf5(tmp_path / "all.h5", "x")


def test_trap_terabytes_of_which_hardly_any_were_written(tmp_path):
    """An index of all its chunks would take 16 GiB."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (2**42,), "u1", chunks=(2**12,), compression="gzip", fillvalue=3)
        file["x"][2**41] = 9
    with hdf5(tmp_path / "a.h5", "x") as source:
        assert "1 of 1,073,741,824 chunks were ever written" in source.facts()["elements"]
        assert source.take(np.array([2**41, 5, 2**42 - 1]), 0).tolist() == [9, 3, 3]


def test_trap_a_checksum_that_does_not_match(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(40.0), chunks=(10,), fletcher32=True)
    with h5py.File(tmp_path / "a.h5") as file:
        offset = file["x"].id.get_chunk_info(2).byte_offset
    with open(tmp_path / "a.h5", "r+b") as file:
        file.seek(offset + 3)
        file.write(b"\x55")
    with hdf5(tmp_path / "a.h5", "x") as source:
        assert float(source(19)) == 19
        with pytest.raises(DataError, match=rf"dataset 'x' in .*a\.h5' is damaged: chunk \(2,\), 84 bytes from byte {offset}"):
            source(20)


def test_trap_a_filter_that_nobody_knows(tmp_path, writer):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(301, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_INT32, h5py.h5s.create_simple((4,)), plist)
        h5py.Dataset(file["x"].id).id.write_direct_chunk((0,), np.arange(4, dtype="i4").tobytes())
    with pytest.raises(DataError, match=r"dataset '/?x' in .*filter 301"):
        hdf5(tmp_path / "a.h5", "x")(0)
