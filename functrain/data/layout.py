"""How a dataset lies in its HDF5 file, and by which way it can be read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import DataError
from functrain.data.rows import readable

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class Layout:
    """One dataset: its name, what it holds, and the way to its bytes (`offset` is None where it cannot be mapped)."""

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


@contextmanager
def opened(path: str) -> Iterator[h5py.File]:
    """The file at `path`, open for reading; `DataError` that says what is wrong where it cannot be opened."""
    file = open_file(path)
    try:
        yield file
    finally:
        file.close()


def open_file(path: str) -> h5py.File:
    """Like `opened`, for the caller to close."""
    import h5py

    if not os.path.exists(path):
        raise DataError(f"no file {path!r} (in {os.path.abspath(os.path.dirname(path) or '.')!r})")
    if os.path.isdir(path):
        raise DataError(f"{path!r} is a directory, not an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        text = str(error)
        if "truncated" in text:
            raise DataError(
                f"{path!r} is truncated: it is shorter than its own header says. Write it again ({text})"
            ) from error
        if "signature not found" in text:
            size = os.path.getsize(path)
            raise DataError(f"{path!r} is not an HDF5 file ({size} bytes, without HDF5's signature)") from error
        raise DataError(f"{path!r} cannot be opened: {text}") from error
    except RuntimeError as error:
        raise DataError(f"{path!r} is damaged: {error}") from error


def found(file: h5py.File, path: str, name: str | None) -> h5py.Group | h5py.Dataset:
    """The group or dataset called `name`; `DataError` that lists what there is where it is missing."""
    import h5py

    if name is None or not name.strip("/"):
        return file["/"]
    try:
        return file[name]
    except (KeyError, OSError, RuntimeError) as error:
        parent = os.path.dirname(name.strip("/")) or "/"
        near: Any = file.get(parent) if parent in file else file
        held = listing(near if isinstance(near, h5py.Group) else file)
        raise DataError(f"{path!r} has no {name!r}: {parent!r} holds {held} ({error})") from error


def listing(group: h5py.Group) -> str:
    """The names in a group, in words."""
    names = list(group)
    return (", ".join(repr(name) for name in names[:20]) + (" …" if len(names) > 20 else "")) or "nothing"


def layout_of(dataset: h5py.Dataset, path: str, name: str) -> Layout:
    """The layout of a dataset; `DataError` where its elements cannot become rows of a tensor.

    `name` is where it was found: behind an external link, its own name is one in another file.
    """
    name = name.strip("/")
    where = f"dataset {name!r} in {path!r}"
    dtype, shape = dataset.dtype, dataset.shape
    if not readable(dtype):
        raise DataError(
            f"{where} has dtype {_kind(dtype)}, which no tensor can hold: choose others with datasets=[…], "
            "or write its numbers as bool, int, float or complex"
        )
    if not shape:
        raise DataError(f"{where} is {'empty' if shape is None else 'a scalar'}: expected shape (N, …)")
    if shape[0] == 0:
        raise DataError(f"{where} has no samples: its shape is {shape}")
    reason = _hindrance(dataset, path)
    if reason is not None:
        return Layout(name, shape, dtype, None, f"{reason}: read through h5py")
    layout = Layout(name, shape, dtype, dataset.id.get_offset(), "contiguous, mapped into memory")
    if os.path.getsize(path) < (layout.offset or 0) + layout.size:
        raise DataError(
            f"{where} is truncated: it needs {(layout.offset or 0) + layout.size} bytes, the file has {os.path.getsize(path)}"
        )
    return layout


def _hindrance(dataset: h5py.Dataset, path: str) -> str | None:
    """Why the dataset's bytes cannot be used where they lie; None where they can."""
    import h5py

    plist = dataset.id.get_create_plist()
    kind = plist.get_layout()
    if kind == h5py.h5d.CHUNKED:
        return _chunked(dataset)
    if kind != h5py.h5d.CONTIGUOUS:
        return {h5py.h5d.COMPACT: "compact, inside the header", h5py.h5d.VIRTUAL: "virtual"}.get(kind, "of unknown layout")
    if plist.get_external_count():
        return "stored in an external file"
    # Behind an external link, the offset is one in another file.
    if not os.path.samefile(dataset.file.filename, path):
        return "linked from another file"
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
    filters = [_filter(plist.get_filter(place)) for place in range(plist.get_nfilters())]
    reason = f"chunked {'x'.join(map(str, chunks))} with {'+'.join(filters) or 'no filter'}"
    touched = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape[1:], chunks[1:]))
    return reason + (f", one element lies in {touched} chunks" if touched > 1 else "")


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


def _kind(dtype: np.dtype) -> str:
    import h5py

    if h5py.check_string_dtype(dtype) is not None:
        return "string"
    if h5py.check_vlen_dtype(dtype) is not None:
        return f"variable-length {h5py.check_vlen_dtype(dtype)}"
    if h5py.check_ref_dtype(dtype) is not None:
        return "reference"
    if dtype.names:
        return f"compound ({', '.join(dtype.names)})"
    return "opaque" if dtype.kind == "V" and not dtype.subdtype else str(dtype)
