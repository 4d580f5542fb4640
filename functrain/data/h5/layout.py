"""How a dataset lies in its HDF5 file, and by which way it can be read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import ArgumentError, DataError
from functrain.data.h5.files import intact
from functrain.data.h5.filters import FLETCHER32, Pipeline
from functrain.data.h5.index import ChunkIndex, misplaced, sparse
from functrain.data.h5.parameters import check_parameters
from functrain.data.h5.plausible import plausible
from functrain.data.h5.virtual import check_virtual

if TYPE_CHECKING:
    import h5py


# Rows below so many bytes can be gathered as NumPy's elements, which cannot be larger.
LARGEST = 1 << 31


@dataclass(frozen=True)
class Layout:
    """One dataset: what it holds, where its bytes lie, and the way to them with the reason for it.

    - `file` is the path of the file that holds the bytes: behind an external link, it is another than the one opened.
    - `way`: "mmap" (its bytes are used where they lie), "direct" (chunks are read and decoded without HDF5), "h5py".
    - `offset` of the first byte, of a contiguous dataset that is mapped; `index`, of a chunked one.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    way: str
    reason: str
    axis: int = 0
    offset: int | None = None
    index: ChunkIndex | None = field(default=None, repr=False, compare=False)
    pipeline: Pipeline | None = field(default=None, repr=False, compare=False)
    fill: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def length(self) -> int:
        """The number of samples."""
        return self.shape[self.axis]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return (*self.shape[: self.axis], *self.shape[self.axis + 1 :])

    @property
    def size(self) -> int:
        """The size of all elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def decoded(self) -> bool:
        """Whether its rows come out of chunks that are decoded, by threads where there are some."""
        return self.index is not None and self.way != "mmap"

    def by_h5py(self, reason: str) -> Layout:
        """The same dataset, read through h5py for this reason."""
        return replace(self, way="h5py", reason=reason)

    def __str__(self) -> str:
        along = f" along axis {self.axis}" if self.axis else ""
        return f"{self.shape} {self.dtype}{along}, {self.way}: {self.reason}"


def layout_of(dataset: h5py.Dataset, path: str, name: str, axis: int = 0, mappable: bool = True) -> Layout:
    """The layout of a dataset with samples along `axis`; `DataError` where it has none, `ArgumentError` without that axis.

    `path` and `name` are where it was found: behind a link, its own are others. A file that is not on this machine, or
    that another process writes to, is not `mappable`.
    """
    name = name.strip("/")
    where = f"dataset {name!r} in {path!r}"
    with intact(where):
        return _layout(dataset, path, name, where, axis, mappable)


def _layout(dataset: h5py.Dataset, path: str, name: str, where: str, axis: int, mappable: bool) -> Layout:
    file, dtype, shape = dataset.file.filename, dataset.dtype, dataset.shape
    if not shape:
        raise DataError(f"{where} is {'empty' if shape is None else 'a scalar'}: expected shape (N, …)")
    if not -len(shape) <= axis < len(shape):
        raise ArgumentError(f"{where} has shape {shape}: axis must lie in {-len(shape)} … {len(shape) - 1}, got {axis}")
    axis %= len(shape)
    if shape[axis] == 0:
        raise DataError(f"{where} has no samples: its shape is {shape}")
    plausible(dataset, axis)
    check_virtual(dataset)
    plain = Layout(file, name, shape, dtype, "h5py", "", axis)
    reason = _hindrance(dataset)
    if reason is not None:
        return plain.by_h5py(f"{reason}: read through h5py")
    if dataset.chunks is not None:
        return _chunked(dataset, plain, mappable)
    if not mappable:
        return plain.by_h5py("contiguous, in a file that cannot be mapped: read through h5py")
    linked = "" if os.path.samefile(file, path) else f" from {file!r}"
    layout = replace(plain, way="mmap", reason=f"contiguous, mapped into memory{linked}", offset=dataset.id.get_offset())
    needed, size = (layout.offset or 0) + layout.size, os.path.getsize(file)
    if size < needed:
        raise DataError(f"{where} is truncated: it needs {needed} bytes, the file has {size}")
    return layout


def _hindrance(dataset: h5py.Dataset) -> str | None:
    """Why the dataset's bytes cannot be used as they are in the file, contiguous or by chunks; None where they can."""
    import h5py

    plist = dataset.id.get_create_plist()
    kind = plist.get_layout()
    # Such data are pointers into a heap of the file, although HDF5 tells where they lie.
    if dataset.dtype.hasobject:
        return "of variable length"
    # The rows of such a dataset have dimensions that its shape does not tell.
    if dataset.dtype.subdtype is not None:
        return "of an array type"
    if kind not in (h5py.h5d.CHUNKED, h5py.h5d.CONTIGUOUS):
        return {h5py.h5d.COMPACT: "compact, inside the header", h5py.h5d.VIRTUAL: "virtual"}.get(kind, "of unknown layout")
    # h5py widens numbers that NumPy does not know (bfloat16 to float32): the bytes are not what the dtype says.
    if not h5py.h5t.py_create(dataset.dtype, logical=True).equal(dataset.id.get_type()):
        return "stored in a number format that NumPy does not have"
    if not dataset.size or not dataset.dtype.itemsize:
        return "without bytes"
    if kind == h5py.h5d.CHUNKED:
        return None
    if plist.get_external_count():
        return "stored in an external file"
    # An unallocated dataset has no offset, or a meaningless one where the file has a user block.
    if dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize or dataset.id.get_offset() is None:
        return "not allocated: all fill value"
    return None


# --- chunked -------------------------------------------------------------------------------------------------


def _chunked(dataset: h5py.Dataset, plain: Layout, mappable: bool) -> Layout:
    chunks = dataset.chunks
    check_chunks(dataset)
    if not hasattr(dataset.id, "chunk_iter"):
        return plain.by_h5py(f"{_described(plain, chunks)}; this h5py cannot list chunks: read through h5py")
    pipeline = Pipeline.of(dataset)
    wrong = misplaced(dataset) or sparse(dataset)
    if wrong is not None:
        by_h5py = replace(plain, pipeline=pipeline)
        return by_h5py.by_h5py(f"{_described(plain, chunks)} with {pipeline}: read through h5py ({wrong})")
    index = ChunkIndex.of(dataset)
    layout = replace(plain, index=index, pipeline=pipeline, fill=_fill(dataset))
    text = f"{_described(plain, chunks)} with {pipeline}"
    if pipeline.hindrance is not None:
        return layout.by_h5py(f"{text}: read through h5py ({pipeline.hindrance})")
    whole = plain.axis == 0 and chunks[1:] == plain.shape[1:]
    if pipeline.plain and mappable and whole and (index.offset >= 0).all() and (index.size == index.bytes).all():
        return replace(layout, way="mmap", reason=f"{text}, mapped into memory")
    return replace(layout, way="direct", reason=f"{text}, decoded outside HDF5's lock")


def _fill(dataset: h5py.Dataset) -> np.ndarray:
    """One element of what stands where nothing was written, as bytes `(itemsize,)`."""
    one = np.zeros((), dataset.dtype)
    value: Any = dataset.fillvalue
    if value is not None:
        one[...] = value
    return np.frombuffer(one.tobytes(), np.uint8)


def _described(layout: Layout, chunks: tuple[int, ...]) -> str:
    text = f"chunked {'x'.join(map(str, chunks))}"
    sizes = [(size, chunk) for place, (size, chunk) in enumerate(zip(layout.shape, chunks)) if place != layout.axis]
    touched = math.prod(-(-size // chunk) for size, chunk in sizes)
    return text + (f", one element lies in {touched} chunks," if touched > 1 else "")


def check_chunks(dataset: h5py.Dataset) -> None:
    """Raise `DataError` for a damaged index of chunks that HDF5 would crash on."""
    if dataset.chunks is None:
        return
    check_parameters(dataset)
    # HDF5 2.0 takes the 4 bytes of the checksum off a chunk's size unasked: below 4 that is a crash (SIGSEGV).
    # Looking at all sizes took 0.8 µs a chunk.
    if not dataset.fletcher32:
        return
    plist = dataset.id.get_create_plist()
    checksum = 1 << [plist.get_filter(place)[0] for place in range(plist.get_nfilters())].index(FLETCHER32)
    whole = math.prod(dataset.chunks) * dataset.dtype.itemsize
    short: list[tuple[int, ...]] = []

    def look(chunk: h5py.h5d.StoreInfo) -> None:
        # Tiny chunks may lack the checksum: each by its mask, those at the edge all together, without one.
        if chunk.size < 4 and not chunk.filter_mask & checksum and chunk.size != whole:
            short.append(chunk.chunk_offset)

    dataset.id.chunk_iter(look)
    if short:
        raise DataError(
            f"dataset {dataset.name!r} in {dataset.file.filename!r} is damaged: its chunk at {short[0]} has no bytes"
        )
