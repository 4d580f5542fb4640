"""Copying the stored bytes of a dataset into a part of another one, undecoded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.disk import Piece
from functrain.data.h5.files import intact
from functrain.data.h5.filters import FLETCHER32, DecodeError, verified
from functrain.data.h5.index import ChunkIndex, misplaced
from functrain.data.h5.output import Output

if TYPE_CHECKING:
    import h5py

Advance = Callable[[int], None]
Place = tuple[int, ...]

_DEFLATE = 1
# Shorter runs are copied faster through memory, many at once.
_LEAST_RUN = 1 << 16
# Between two reports of progress.
_STEP = 1 << 23
_BLOCK = 256


def hindrance(dataset: h5py.Dataset, target: h5py.Dataset, start: Place) -> str | None:
    """Why the bytes of `dataset` cannot be copied as they are into `target`, from element `start` on; None where they can."""
    kinds = [each.id.get_type() for each in (dataset, target)]
    if dataset.dtype.hasobject:
        return "of variable length"
    if not kinds[0].equal(kinds[1]):
        return "stored in another number format"
    if not dataset.size:
        return "without bytes"
    if dataset.file.driver != "sec2":
        return "not in a plain file of this machine"
    if (dataset.chunks is None) != (target.chunks is None):
        return "chunked on one side only"
    return _whole(dataset, target, start) if dataset.chunks is None else _chunked(dataset, target, start)


def _whole(dataset: h5py.Dataset, target: h5py.Dataset, start: Place) -> str | None:
    import h5py

    plist = dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count():
        return "stored in another way"
    if dataset.id.get_offset() is None or dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize:
        return "not allocated: all fill value"
    if target.id.get_offset() is None:
        return "the target is not allocated"
    axis = _run_axis(dataset.shape, target.shape)
    runs, size = math.prod(dataset.shape[:axis]), math.prod(dataset.shape[axis:]) * dataset.dtype.itemsize
    return f"runs of {size} bytes only" if runs > 1 and size < _LEAST_RUN else None


def _run_axis(shape: Place, whole: Place) -> int:
    """From which axis on a block of `shape` lies in one piece inside an array of shape `whole`."""
    axis = len(shape) - 1
    while axis > 0 and shape[axis] == whole[axis]:
        axis -= 1
    return axis


def _chunked(dataset: h5py.Dataset, target: h5py.Dataset, start: Place) -> str | None:
    if dataset.chunks != target.chunks:
        return f"chunks are {dataset.chunks}, not {target.chunks}"
    for first, size, whole, chunk in zip(start, dataset.shape, target.shape, dataset.chunks):
        if first % chunk:
            return "begins within a chunk"
        if size % chunk and first + size != whole:
            return "its last chunk is not full"
    plists = [each.id.get_create_plist() for each in (dataset, target)]
    filters = [filters_of(plist) for plist in plists]
    if _decoded_alike(filters[0]) != _decoded_alike(filters[1]):
        return "other filters"
    if any(code == FLETCHER32 for code, _ in filters[0][:-1]):
        return "a checksum lies below other filters"
    if target.maxshape != target.shape and fill_of(dataset) != fill_of(target):
        # Behind the end of its last chunk, where the target may grow to, stands its own.
        return "another fill value"
    wrong = misplaced(dataset)
    if wrong is not None:
        return wrong
    itemsize = dataset.dtype.itemsize
    if filters[0] and _is_partial(dataset) and _leaves_partial(plists[0], itemsize) != _leaves_partial(plists[1], itemsize):
        return "partial chunks are filtered on one side only"
    return None


def _is_partial(dataset: h5py.Dataset) -> bool:
    return any(size % chunk for size, chunk in zip(dataset.shape, dataset.chunks))


def _leaves_partial(plist: Any, itemsize: int) -> bool:
    """Whether datasets with these properties leave partial chunks unfiltered, which h5py does not tell: one is made to see."""
    import h5py

    copy = without_filters(plist.copy())
    # Four bytes more than the chunk has, where it is applied.
    copy.set_fletcher32()
    blank = np.zeros((), f"V{itemsize}")
    copy.set_fill_value(blank)
    copy.set_alloc_time(h5py.h5d.ALLOC_TIME_INCR)
    chunks = copy.get_chunk()
    with h5py.File("probe", "w", driver="core", backing_store=False) as file:
        shape = tuple(max(1, chunk - 1) for chunk in chunks)
        space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED,) * len(shape))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.py_create(blank.dtype), space, copy))
        dataset[(0,) * len(shape)] = blank
        file.flush()
        return bool(dataset.id.get_chunk_info(0).size == math.prod(chunks) * itemsize)


Filters = list[tuple[int, tuple[int, ...]]]


def filters_of(plist: Any) -> Filters:
    """The numbers of a dataset's filters, with their parameters."""
    return [(found[0], tuple(found[2])) for found in map(plist.get_filter, range(plist.get_nfilters()))]


def without_filters(plist: Any) -> Any:
    """The list of properties, from which all filters are taken."""
    # 0 stands for all. To take one of several away corrupts memory (HDF5 2.0): parameters are moved, pointers to them not.
    plist.remove_filter(0)
    return plist


def _decoded_alike(filters: Filters) -> Filters:
    # The level of gzip says how long it searched: it is read the same.
    return [(code, () if code == _DEFLATE else values) for code, values in filters]


def copy_bytes(output: Output, dataset: h5py.Dataset, target: h5py.Dataset, start: Place, advance: Advance) -> None:
    """Copy `dataset`, which has no `hindrance`, to where it begins in `target`; `advance` is told of bytes, decoded.

    Raises `DataError` for an index that names bytes that are not there, and for a chunk that fails its checksum.
    """
    if dataset.chunks is None:
        _copy_runs(output, dataset, target, start, advance)
    else:
        _copy_chunks(output, dataset, target, start, advance)


def _copy_runs(output: Output, dataset: h5py.Dataset, target: h5py.Dataset, start: Place, advance: Advance) -> None:
    path, descriptor = dataset.file.filename, dataset.file.id.get_vfd_handle()
    axis, itemsize = _run_axis(dataset.shape, target.shape), dataset.dtype.itemsize
    size = math.prod(dataset.shape[axis:]) * itemsize
    first, base = dataset.id.get_offset(), target.id.get_offset()
    if first + dataset.size * itemsize > os.fstat(descriptor).st_size:
        raise DataError(f"dataset {dataset.name!r} in {path!r} cannot be read: the file is truncated")
    for number, outer in enumerate(np.ndindex(*dataset.shape[:axis])):
        place = [here + there for here, there in zip(start, (*outer, *[0] * len(start)))]
        where = base + int(np.ravel_multi_index(place, target.shape)) * itemsize
        for done in range(0, size, _STEP):
            step = min(_STEP, size - done)
            output.place_bytes(Piece(path, descriptor, first + number * size + done, step), where + done)
            advance(step)


def _copy_chunks(output: Output, dataset: h5py.Dataset, target: h5py.Dataset, start: Place, advance: Advance) -> None:
    path, descriptor = dataset.file.filename, dataset.file.id.get_vfd_handle()
    where = f"dataset {dataset.name!r} in {path!r}"
    with intact(where):
        index = ChunkIndex.of(dataset)
    filters = filters_of(dataset.id.get_create_plist())
    _check(index, len(filters), os.fstat(descriptor).st_size, where)
    bare_edges = bool(filters) and _is_partial(dataset) and _leaves_partial(dataset.id.get_create_plist(), index.itemsize)
    keeps_missing = fill_of(dataset) == fill_of(target)
    checksum = 1 << len(filters) - 1 if filters and filters[-1][0] == FLETCHER32 else 0
    columns = (index.offset, index.size, index.mask)
    for first in range(0, len(index), _BLOCK):
        block = slice(first, first + _BLOCK)
        places = np.stack(np.unravel_index(np.arange(first, min(first + _BLOCK, len(index))), index.grid), 1) * index.chunks
        entries = zip(places.tolist(), (places + start).tolist(), *(each[block].tolist() for each in columns))
        for origin, place, offset, size, mask in entries:
            if offset >= 0:
                piece = Piece(path, descriptor, offset, size)
                bare = bare_edges and any(a + c > most for a, c, most in zip(origin, index.chunks, index.shape))
                if checksum and not mask & checksum and not bare:
                    _verify(piece, f"{where} cannot be read: its chunk at {tuple(origin)}, byte {offset},")
                output.place_chunk(target, tuple(place), piece, mask)
            elif not keeps_missing:
                region = tuple(slice(a, a + c) for a, c in zip(origin, index.chunks))
                with intact(where):
                    here = dataset[region]
                target[tuple(slice(a, a + size) for a, size in zip(place, here.shape))] = here
                output.check()
        advance(len(places) * index.bytes)


def _check(index: ChunkIndex, filters: int, end: int, where: str) -> None:
    """Raise `DataError` for a damaged index: bytes outside of the file, or chunks of another size than theirs."""
    stored = index.offset >= 0
    offset, size, mask = index.offset[stored], index.size[stored].astype(np.int64), index.mask[stored]
    outside = (size < 1) | (offset + size > end)
    if outside.any():
        place, length = int(offset[outside][0]), int(size[outside][0])
        raise DataError(f"{where} is damaged: its index has a chunk of {length} bytes at byte {place}, the file has {end}")
    every = (1 << filters) - 1
    wrong = ((mask & every) == every) & (size != index.bytes)
    if wrong.any():
        raise DataError(
            f"{where} is damaged: its chunk at byte {int(offset[wrong][0])} has {index.bytes} bytes, "
            f"and is stored without filters in {int(size[wrong][0])}"
        )


def _verify(piece: Piece, what: str) -> None:
    try:
        verified(memoryview(piece.read()))
    except DecodeError as error:
        raise DataError(f"{what} is damaged: {error}") from error


def fill_of(dataset: h5py.Dataset) -> bytes | None:
    """What stands where nothing was written, as bytes; None where that is not defined."""
    import h5py

    plist = dataset.id.get_create_plist()
    if plist.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED:
        return None
    value = np.zeros((), dataset.dtype)
    plist.get_fill_value(value)
    return value.tobytes()


__all__ = ["copy_bytes", "filters_of", "hindrance", "without_filters"]
