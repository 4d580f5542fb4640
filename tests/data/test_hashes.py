"""Content hashes: of what a dataset holds, and of nothing else."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import functrain as ft
from functrain.core.errors import DataError
from functrain.data.h5.filters import Pipeline

DRAW = np.random.default_rng(0)
DTYPES = ("bool", "u1", "i2", "u4", "i8", "f2", "f4", "f8", "c8", "c16")


def written(path: Path, **datasets: Any) -> Path:
    """A file of datasets, each an array, or a tuple of the arguments of create_dataset."""
    with h5py.File(path, "w") as file:
        for name, given in datasets.items():
            array, how = given if isinstance(given, tuple) else (given, {})
            file.create_dataset(name, data=array, **how)
    return path


def expected(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    head = f"functrain content 1\n{dtype}\n{'×'.join(map(str, shape))}\n"
    return hashlib.sha256(head.encode() + data).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hash_is_that_of_dtype_shape_and_bytes_in_whatever_layout(tmp_path: Path, dtype: str) -> None:
    array = (100 * DRAW.standard_normal((1000, 7))).astype(dtype)
    swapped = array.astype(array.dtype.newbyteorder(">"))
    layouts: dict[str, dict[str, Any]] = {
        "contiguous": {},
        "chunked": {"chunks": (64, 3)},
        "gzip": {"chunks": (100, 7), "compression": "gzip", "shuffle": True, "fletcher32": True},
        "lzf": {"chunks": (7, 7), "compression": "lzf", "maxshape": (None, 7)},
    }
    path = written(
        tmp_path / "a.h5",
        **{name: (array, how) for name, how in layouts.items()},
        **{f"{name}, swapped": (swapped, how) for name, how in layouts.items()},
    )
    hashes = ft.content_hash(path)
    assert isinstance(hashes, dict)
    assert len(hashes) == 8
    assert set(hashes.values()) == {expected(np.dtype(dtype).name, (1000, 7), array.tobytes())}


@given(hnp.arrays(st.sampled_from(["u1", "<i4", ">f8"]), hnp.array_shapes(max_dims=3, max_side=5, min_side=0)), st.data())
def test_a_change_of_one_byte_dtype_or_order_changes_its_own_hash_alone(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("hash")
    other = {"train": np.arange(5), "validation": np.zeros((2, 2), "f4")}
    before = ft.content_hash(written(folder / "a.h5", test=array, **other))
    flipped = bytearray(array.tobytes())
    changed = [array.astype("c16" if array.dtype.kind == "f" else "i8"), array.reshape(*array.shape, 1)]
    if flipped:
        flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed.append(np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape))
    if array.size and (array[::-1].tobytes() != array.tobytes()):
        changed.append(array[::-1])
    for number, version in enumerate(changed):
        after = ft.content_hash(written(folder / f"{number}.h5", test=version, **other))
        assert isinstance(after, dict)
        assert {name for name in after if after[name] != before[name]} == {"test"}


def test_one_dataset_has_one_hash_and_a_group_has_those_below_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", **{"a/x": np.arange(3), "a/b/y": np.arange(4), "z": np.arange(5)})
    with h5py.File(path, "a") as file:
        file["a/soft"] = h5py.SoftLink("/z")
        file["a/b/up"] = file["a"]
        file["a/again"] = h5py.SoftLink("/a/b")
    whole, group = ft.content_hash(path), ft.content_hash(path, "/a/")
    assert isinstance(whole, dict)
    assert sorted(whole) == ["a/b/y", "a/soft", "a/x", "z"]
    assert group == {"b/y": whole["a/b/y"], "x": whole["a/x"], "soft": whole["z"]}
    assert ft.content_hash(path, "a/b/y") == whole["a/b/y"]
    assert ft.content_hash(written(tmp_path / "empty.h5")) == {}


def test_a_piece_of_a_large_dataset_is_not_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functrain.data.h5.hashes._PIECE", 1000)
    wide, deep = DRAW.integers(0, 99, (3, 40, 50)), DRAW.integers(0, 99, (500, 7))
    text = np.array([bytes(DRAW.integers(65, 90, 5, "u1")) * 40 for _ in range(60)], object)
    path = written(
        tmp_path / "a.h5",
        wide=wide,
        split=(wide, {"chunks": (2, 7, 30), "compression": "gzip"}),
        deep=(deep, {"chunks": (33, 7)}),
        text=(text, {"dtype": h5py.string_dtype()}),
    )
    hashes = ft.content_hash(path)
    assert isinstance(hashes, dict)
    assert hashes["wide"] == hashes["split"] == expected("int64", wide.shape, wide.tobytes())
    assert hashes["deep"] == expected("int64", deep.shape, deep.tobytes())
    assert hashes["text"] == expected("string[variable,utf-8]", (60,), b"".join(counted(one) for one in text))


def counted(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


def vary(*arrays: np.ndarray) -> np.ndarray:
    held = np.empty(len(arrays), object)
    held[:] = arrays
    return held


PAIR = np.dtype([("x", ">f4"), ("y", "<i2", (2,))], align=True)
PAIRS = np.array([(1.5, (2, 3)), (2.5, (4, 5))], PAIR)
MIXED = np.dtype([("name", h5py.string_dtype()), ("n", ">i4"), ("seq", h5py.vlen_dtype(np.dtype("<u2")))])
MIX = np.array([("é", 7, np.array([1, 2], "u2")), ("", 8, np.array([], "u2"))], MIXED)
COLOUR = h5py.enum_dtype({"red": 1, "green": 0}, "i1")
KINDS: dict[str, tuple[Callable[[h5py.File], Any], str, tuple[int, ...], bytes]] = {
    "scalar": (lambda f: f.create_dataset("d", data=np.int16(-2)), "int16", (), b"\xfe\xff"),
    "nothing": (lambda f: f.create_dataset("d", (0, 3), "f4"), "float32", (0, 3), b""),
    "fixed text": (lambda f: f.create_dataset("d", data=np.array([b"ab", b"c"])), "string[2,ascii]", (2,), b"abc\0"),
    "enum": (lambda f: f.create_dataset("d", data=[1, 0], dtype=COLOUR), "enum(int8;green=0,red=1)", (2,), b"\1\0"),
    "opaque": (lambda f: f.create_dataset("d", data=np.array([b"abc"]).view("V3")), "opaque[3]", (1,), b"abc"),
    "fill": (lambda f: f.create_dataset("d", (2,), "u1", fillvalue=9), "uint8", (2,), b"\x09\x09"),
    "compound": (
        lambda f: f.create_dataset("d", data=PAIRS),
        "compound(x:float32,y:array[2](int16))",
        (2,),
        struct.pack("<fhhfhh", 1.5, 2, 3, 2.5, 4, 5),
    ),
    "sequences": (
        lambda f: f.create_dataset("d", data=vary(np.array([1, 2]), np.array([])), dtype=h5py.vlen_dtype("<i4")),
        "variable(int32)",
        (2,),
        struct.pack("<qiiq", 2, 1, 2, 0),
    ),
    "mixed": (
        lambda f: f.create_dataset("d", data=MIX),
        "compound(name:string[variable,utf-8],n:int32,seq:variable(uint16))",
        (2,),
        counted("é".encode()) + struct.pack("<iqHH", 7, 2, 1, 2) + counted(b"") + struct.pack("<iq", 8, 0),
    ),
    "references": (
        lambda f: f.create_dataset("d", data=[f["group"].ref, h5py.Reference()], dtype=h5py.ref_dtype),
        "reference",
        (2,),
        counted(b"/group") + counted(b""),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_element_is_hashed_as_the_docstring_says(tmp_path: Path, kind: str) -> None:
    write, dtype, shape, data = KINDS[kind]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("group")
        write(file)
    assert ft.content_hash(tmp_path / "a.h5") == {"d": expected(dtype, shape, data)}


def test_an_empty_dataspace_is_another_than_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", null=h5py.Empty("f4"), none=np.zeros(0, "f4"), one=np.float32(0))
    hashes = ft.content_hash(path)
    assert isinstance(hashes, dict)
    assert len(set(hashes.values())) == 3


def test_what_cannot_be_hashed_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", x=np.arange(10))
    with h5py.File(path, "a") as file:
        file["gone/away"] = h5py.SoftLink("/nothing")
        file["regions/r"] = np.array([file["x"].regionref[2:5]], h5py.regionref_dtype)
        file.create_dataset("absurd/a", (2**60,), "f4", chunks=(1024,))
    for group, message in {
        "gone": "'gone/away' in .* cannot be hashed",
        "regions": "dataset 'regions/r' in .* holds region references",
        "absurd": "'/absurd/a' in .* 4.0 EiB",
        "absent": "has no 'absent'",
    }.items():
        with pytest.raises(DataError, match=message):
            ft.content_hash(path, group)
    chunked = written(tmp_path / "b.h5", x=(np.arange(1000), {"chunks": (100,), "fletcher32": True}))
    with h5py.File(chunked) as file:
        place = file["x"].id.get_chunk_info(5).byte_offset
    data = bytearray(chunked.read_bytes())
    data[place] ^= 1
    chunked.write_bytes(data)
    with pytest.raises(DataError, match=r"dataset 'x' in .* chunk \(5,\)"):
        ft.content_hash(chunked)


def test_of_tall_chunks_a_row_is_not_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = DRAW.integers(0, 9, (20_000, 60)).astype("f8")
    path = written(tmp_path / "a.h5", x=(array, {"chunks": (20_000, 1), "compression": "gzip", "compression_opts": 1}))
    decoded = []

    class Counting(Pipeline):
        def decode(self, raw: bytes | memoryview, mask: int, out: np.ndarray) -> None:
            decoded.append(len(raw))
            super().decode(raw, mask, out)

    monkeypatch.setattr("functrain.data.h5.layout.Pipeline", Counting)
    # Whether all chunks that lie side by side fit in the memory, or must be decoded again for each piece.
    for most, bound in ((64 << 20, 2), (5 << 20, 4)):
        monkeypatch.setattr("functrain.data.h5.hashes._PIECE", 1 << 20)
        monkeypatch.setattr("functrain.data.h5.hashes._MOST", most)
        decoded.clear()
        assert ft.content_hash(path, "x") == expected("float64", array.shape, array.tobytes())
        assert 60 <= len(decoded) <= 60 * bound


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", good=np.arange(4))
    with h5py.File(path, "a") as file:
        file.id.links.create_hard(b"bad\xff", file.id, b"good")
        file.create_group(b"group\xfe")["x"] = np.arange(4)
    names = ["bad\udcff", "good", "group\udcfe/x"]
    assert ft.content_hash(path) == dict.fromkeys(names, expected("int64", (4,), np.arange(4).tobytes()))
    for name in names:
        with ft.hdf5(path, name) as source:
            assert source(3) == 3
    with ft.hdf5(path) as source:
        assert source(3) == {"bad\udcff": 3, "good": 3}
    with ft.hdf5(path, "group\udcfe", datasets=["x"]) as source:
        assert source(3) == {"x": 3}
    with pytest.raises(DataError, match="not UTF-8"):
        ft.h5concat(tmp_path / "b.h5", [path, path])
    command = [sys.executable, "-m", "functrain.cli", "data", "inspect", str(path), "--no-speed"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert b"group" in done.stdout
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(b"functrain: the output cannot be written")
    assert b"Traceback" not in done.stderr
