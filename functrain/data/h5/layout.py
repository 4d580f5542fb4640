"""How a dataset lies in its HDF5 file, and by which way it can be read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import intact

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class Layout:
    """One dataset: its name, what it holds, and the way to its bytes (`offset` is None where it cannot be mapped).

    `file` is the path of the file that holds the bytes: behind an external link, it is another than the one opened.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None
    reason: str

    @property
    def way(self) -> str:
        """`mmap` or `h5py`."""
        return "h5py" if self.offset is None else "mmap"

    @property
    def size(self) -> int:
        """The size of all elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}, {self.way}: {self.reason}"


def layout_of(dataset: h5py.Dataset, path: str, name: str) -> Layout:
    """The layout of a dataset; `DataError` where it has no samples.

    `path` and `name` are where it was found: behind a link, its own are others.
    """
    name = name.strip("/")
    where = f"dataset {name!r} in {path!r}"
    with intact(where):
        return _layout(dataset, path, name, where)


def _layout(dataset: h5py.Dataset, path: str, name: str, where: str) -> Layout:
    file, dtype, shape = dataset.file.filename, dataset.dtype, dataset.shape
    if not shape:
        raise DataError(f"{where} is {'empty' if shape is None else 'a scalar'}: expected shape (N, …)")
    if shape[0] == 0:
        raise DataError(f"{where} has no samples: its shape is {shape}")
    reason = _hindrance(dataset)
    if reason is not None:
        return Layout(file, name, shape, dtype, None, f"{reason}: read through h5py")
    way = "contiguous, mapped into memory" + ("" if os.path.samefile(file, path) else f" from {file!r}")
    layout = Layout(file, name, shape, dtype, dataset.id.get_offset(), way)
    needed, size = (layout.offset or 0) + layout.size, os.path.getsize(file)
    if size < needed:
        raise DataError(f"{where} is truncated: it needs {needed} bytes, the file has {size}")
    return layout


def _hindrance(dataset: h5py.Dataset) -> str | None:
    """Why the dataset's bytes cannot be used where they lie; None where they can."""
    import h5py

    plist = dataset.id.get_create_plist()
    kind = plist.get_layout()
    # Such data are pointers into a heap of the file, although HDF5 tells where they lie.
    if dataset.dtype.hasobject:
        return "of variable length"
    if kind == h5py.h5d.CHUNKED:
        return _chunked(dataset)
    if kind != h5py.h5d.CONTIGUOUS:
        return {h5py.h5d.COMPACT: "compact, inside the header", h5py.h5d.VIRTUAL: "virtual"}.get(kind, "of unknown layout")
    if plist.get_external_count():
        return "stored in an external file"
    if not dataset.dtype.isnative:
        return "stored in the other byte order"
    # h5py widens numbers that NumPy does not know (bfloat16 to float32): the bytes are not what the dtype says.
    if not h5py.h5t.py_create(dataset.dtype, logical=True).equal(dataset.id.get_type()):
        return "stored in a number format that NumPy does not have"
    # An unallocated dataset has no offset, or a meaningless one where the file has a user block.
    if dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize or dataset.id.get_offset() is None:
        return "not allocated: all fill value"
    return "without bytes" if not dataset.size else None


def _chunked(dataset: h5py.Dataset) -> str:
    chunks = dataset.chunks
    plist = dataset.id.get_create_plist()
    check_chunks(dataset)
    filters = [_filter(plist.get_filter(place)) for place in range(plist.get_nfilters())]
    reason = f"chunked {'x'.join(map(str, chunks))} with {'+'.join(filters) or 'no filter'}"
    touched = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape[1:], chunks[1:]))
    return reason + (f", one element lies in {touched} chunks" if touched > 1 else "")


def check_chunks(dataset: h5py.Dataset) -> None:
    """Raise `DataError` for a damaged index of chunks that HDF5 would crash on."""
    # HDF5 2.0 takes the 4 bytes of the checksum off a chunk's size unasked: below 4 that is a crash (SIGSEGV).
    # Looking at all sizes took 0.8 µs a chunk.
    if dataset.chunks is None or not dataset.fletcher32:
        return
    short: list[tuple[int, ...]] = []

    def look(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.size < 4:
            short.append(chunk.chunk_offset)

    dataset.id.chunk_iter(look)
    if short:
        raise DataError(
            f"dataset {dataset.name!r} in {dataset.file.filename!r} is damaged: its chunk at {short[0]} has no bytes"
        )


def _filter(described: tuple[int, int, tuple[int, ...], bytes]) -> str:
    known = {
        1: "gzip",
        2: "shuffle",
        3: "fletcher32",
        4: "szip",
        5: "nbit",
        6: "scaleoffset",
        32000: "lzf",
        32015: "zstd",
    }
    return known.get(described[0], f"filter {described[0]}")
