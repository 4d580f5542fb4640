"""HDF5 files of every layout, written and read by h5py alone, in a process of its own."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

COMPOUNDS = {
    "odd": np.dtype([("a", "<i2"), ("b", "u1"), ("c", ">f4")]),
    "padded": np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [0, 8], "itemsize": 16}),
    "nested": np.dtype([("p", [("x", "<f4"), ("y", ">i2")]), ("v", "<f4", (3,)), ("flag", "?")]),
}
# By HDF5's numbers; those above 32000 are hdf5plugin's.
FILTERS = {
    "deflate": 1,
    "shuffle": 2,
    "fletcher32": 3,
    "szip": 4,
    "nbit": 5,
    "scaleoffset": 6,
    "lzf": 32000,
    "blosc": 32001,
    "lz4": 32004,
    "bitshuffle": 32008,
    "zstd": 32015,
}
OPTIONAL = 1


@dataclass(frozen=True)
class Dataset:
    """One dataset to write; `steps` are the shapes that it has one after another, before it comes to its own."""

    shape: tuple[int, ...]
    dtype: str
    layout: str = "contiguous"
    chunks: tuple[int, ...] | None = None
    maxshape: tuple[int | None, ...] | None = None
    steps: tuple[tuple[int, ...], ...] = ()
    filters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    fill: int | None = None
    written: str = "all"
    allocated: str = "DEFAULT"
    whole_edges: bool = True
    unfiltered: bool = False
    content: str = "noise"
    seed: int = 0
    before: int = 0


@dataclass(frozen=True)
class File:
    """A file to write: its datasets are called by their number."""

    datasets: tuple[Dataset, ...]
    libver: str = "earliest"
    userblock: int = 0
    ordered: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def dtype_of(name: str) -> np.dtype:
    """The dtype of that name: NumPy's, an enum, or one of `COMPOUNDS`."""
    if name.endswith("enum"):
        return h5py.enum_dtype({"off": 0, "on": 1, "odd": 77}, basetype=np.dtype(name[0] + "i2"))
    return COMPOUNDS[name] if name in COMPOUNDS else np.dtype(name)


def values(shape: tuple[int, ...], dtype: np.dtype, content: str, seed: int) -> np.ndarray:
    """Numbers of that shape: any bits (`noise`), small ones that rise (`steps`), or a few levels (`levels`)."""
    draw = np.random.default_rng(seed)
    array = np.zeros(shape, dtype)
    if dtype.names:
        for name in dtype.names:
            inner = array[name]
            inner[...] = values(inner.shape, inner.dtype, content, seed + 1)
        return array
    if content == "noise" and dtype.kind in "iufc":
        return np.frombuffer(draw.bytes(array.nbytes), dtype).reshape(shape)
    numbers = np.arange(array.size) // 3 if content == "steps" else draw.integers(0, 3, array.size)
    array[...] = (numbers % 100 if dtype.kind != "b" else numbers % 2).reshape(shape)
    return array


def partial_chunks_unfiltered(plist: h5py.h5p.PropDCID) -> None:
    """What h5py has no call for: H5Pset_chunk_opts, in the library that it loaded."""
    with open("/proc/self/maps") as maps:
        (library,) = {line.split()[-1] for line in maps if "/libhdf5-" in line or line.rstrip().endswith("/libhdf5.so")}
    assert ctypes.PyDLL(library).H5Pset_chunk_opts(ctypes.c_int64(plist.id), ctypes.c_uint(2)) >= 0


def _properties(item: Dataset, dtype: np.dtype, place: str) -> h5py.h5p.PropDCID:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(getattr(h5py.h5d, f"ALLOC_TIME_{item.allocated}"))
    if item.fill is not None:
        plist.set_fill_value(np.array(item.fill, dtype))
    if item.layout == "compact":
        plist.set_layout(h5py.h5d.COMPACT)
    if item.layout == "external":
        plist.set_external(f"{place}.raw".encode(), 5, math.prod(item.shape) * dtype.itemsize)
    if item.layout == "chunked":
        plist.set_chunk(item.chunks)
        if not item.whole_edges:
            partial_chunks_unfiltered(plist)
        for name, options in item.filters:
            if name == "szip":
                plist.set_szip(*options)
            elif name == "scaleoffset":
                plist.set_scaleoffset(*options)
            elif name == "nbit":
                plist.set_filter(FILTERS[name], 0, ())
            else:
                plist.set_filter(FILTERS[name], OPTIONAL, options)
    return plist


def _write(file: h5py.File, name: str, item: Dataset, path: str) -> None:
    dtype = dtype_of(item.dtype)
    if item.before:
        # What follows small data begins at an odd offset.
        file[f"before {name}"] = np.zeros(item.before, "u1")
    if item.layout == "virtual":
        return _write_virtual(file, name, item, dtype)
    plist = _properties(item, dtype, f"{path}.{name}")
    shapes = [*item.steps, item.shape]
    limits = tuple(h5py.h5s.UNLIMITED if size is None else size for size in item.maxshape or item.shape)
    space = h5py.h5s.create_simple(shapes[0], limits if item.layout == "chunked" else None)
    kind = h5py.h5t.py_create(dtype, logical=True)
    dataset = h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, plist))
    for step, shape in enumerate(shapes):
        if step:
            dataset.id.set_extent(shape)
        if step == 0 or (item.written == "all" and shape != item.shape):
            _fill(dataset, item, values(shape, dtype, item.content, item.seed + step))
    if item.unfiltered and dataset.id.get_num_chunks():
        _store_unfiltered(dataset, values(item.chunks, dtype, "steps", item.seed))
    return None


def _fill(dataset: h5py.Dataset, item: Dataset, array: np.ndarray) -> None:
    if item.written == "all":
        dataset[...] = array
    elif item.written == "part":
        # The middle alone: chunks before and behind it are never written, others in part.
        where = tuple(slice(size // 3, max(size // 3 + 1, size // 2)) for size in array.shape)
        dataset[where] = array[where]


def _store_unfiltered(dataset: h5py.Dataset, chunk: np.ndarray) -> None:
    """One chunk without its filters, as HDF5 keeps those that would not shrink."""
    every = (1 << dataset.id.get_create_plist().get_nfilters()) - 1
    first = dataset.id.get_chunk_info(0)
    # HDF5 2.0 keeps the old mask where the size stays, and cannot read that chunk any more.
    if first.size != chunk.nbytes:
        dataset.id.write_direct_chunk(first.chunk_offset, chunk.tobytes(), filter_mask=every)


def _write_virtual(file: h5py.File, name: str, item: Dataset, dtype: np.dtype) -> None:
    array = values(item.shape, dtype, item.content, item.seed)
    half = max(1, item.shape[0] // 2)
    file[f"origin {name}"] = array[:half]
    layout = h5py.VirtualLayout(item.shape, dtype)
    layout[:half] = h5py.VirtualSource(".", f"origin {name}", array[:half].shape)
    if item.written == "all" and half < item.shape[0]:
        file[f"origin {name} b"] = array[half:]
        layout[half:] = h5py.VirtualSource(".", f"origin {name} b", array[half:].shape)
    fill = None if item.fill is None else np.array(item.fill, dtype)[()]
    file.create_virtual_dataset(name, layout, fillvalue=fill)


def write(path: str, described: File) -> None:
    """Write a file, and beside it `.npz` with what h5py reads in it."""
    with h5py.File(
        path, "w", libver=described.libver, userblock_size=described.userblock, track_order=described.ordered
    ) as file:
        for number, item in enumerate(described.datasets):
            _write(file, str(number), item, path)
    with h5py.File(path, "r") as file:
        arrays = {str(number): plain(file[str(number)][...]) for number in range(len(described.datasets))}
    np.savez(f"{path}.npz", **arrays)


def plain(array: np.ndarray) -> np.ndarray:
    """The array without h5py's notes in its dtype, which NumPy cannot save."""
    return array.view(np.dtype(array.dtype.str)) if array.dtype.metadata else array


def expected(path: str | Path) -> dict[str, np.ndarray]:
    """What h5py read."""
    with np.load(f"{path}.npz") as arrays:
        return dict(arrays)


class Writer:
    """A process that writes files, with hdf5plugin's filters, so that this one stays without."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def write(self, path: str | Path, described: File) -> dict[str, np.ndarray]:
        """Write the file; what h5py reads in it, by name."""
        if os.path.exists(path):
            os.unlink(path)
        line = json.dumps([os.fspath(path), asdict(described)])
        assert self._process.stdin
        assert self._process.stdout
        print(line, file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert answer == "written", f"{answer}\n{described}"
        return expected(path)

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@contextmanager
def writing() -> Iterator[Writer]:
    writer = Writer()
    try:
        yield writer
    finally:
        writer.close()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _described(given: dict[str, Any]) -> File:
    items = [Dataset(**{key: _tuples(value) for key, value in item.items()}) for item in given.pop("datasets")]
    return File(tuple(items), **given)


def main() -> None:
    """Write the files that are described line by line."""
    import hdf5plugin  # noqa: F401  # its filters

    for line in sys.stdin:
        path, given = json.loads(line)
        try:
            write(path, _described(given))
            answer = "written"
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
