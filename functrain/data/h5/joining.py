"""Writing one joined dataset: the bytes of its parts as they are, or decoded and encoded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import ArgumentError, DataError
from functrain.data.h5.chunking import Storage
from functrain.data.h5.files import intact
from functrain.data.h5.output import Output
from functrain.data.h5.parts import Joined, Part
from functrain.data.h5.raw_copy import copy_bytes, filters_of, hindrance, without_filters
from functrain.data.h5.sequences import numbers_in, righted
from functrain.data.h5.slabs import slabs

if TYPE_CHECKING:
    import h5py

# Encoding again what such filters gave changes no number: gzip, shuffle, fletcher32, szip, n-bit, bzip2, lzf, blosc, lz4,
# bitshuffle, zstd. Of others (scale-offset, zfp …) that cannot be said.
_LOSSLESS = frozenset({1, 2, 3, 4, 5, 307, 32000, 32001, 32004, 32008, 32015})
_BITSHUFFLE = 32008


class Progress:
    """How much is done, told to the caller's function now and then."""

    def __init__(self, output: Output, tell: Callable[[int, int], object] | None, total: int) -> None:
        self._output, self._tell, self._total = output, tell, total
        self._done = self._told = 0
        self._report(0)

    def advance(self, size: int) -> None:
        """So many bytes more are done."""
        self._done += size
        if self._done - self._told > self._total // 200:
            self._report(self._done)

    def end(self) -> None:
        """All is done."""
        self._output.check()
        if not self._total or self._told < self._total:
            self._report(self._total)

    def _report(self, done: int) -> None:
        # Chunks at the edge count as whole ones.
        self._told = done = min(done, self._total)
        if self._tell is not None:
            with self._output.elsewhere():
                self._tell(done, self._total)


def fill_value(joined: Joined, fill: Any) -> Any:
    """`fill` in the dtype of a dataset that has gaps to be filled; `ArgumentError` where it does not fit. None without gaps."""
    if fill is None or not joined.gaps:
        return None
    dtype = joined.dtype or joined.model.dtype
    if dtype.hasobject:
        return fill
    try:
        with np.errstate(all="ignore"):
            value = np.asarray(fill).astype(dtype)
        same = value.shape == () and (dtype.kind == "V" or bool(value == fill) or (value != value and fill != fill))
    except (TypeError, ValueError, OverflowError):
        same = False
    if not same:
        raise ArgumentError(f"fill={fill!r} is no value of dataset {joined.name!r}, which is {dtype}")
    return value


def write_joined(
    output: Output, joined: Joined, storage: Storage, fill: Any, memory: int, progress: Progress
) -> h5py.Dataset:
    """Write the dataset: with the layout of its model, unless `storage` asks for another."""
    target = _created(output, joined, storage, fill)
    if fill is not None and target.chunks is None and target.size:
        # Chunks that nobody wrote are fill values by themselves.
        for slab in slabs(target.shape, target.dtype.itemsize, memory):
            target[slab] = fill
            output.check()
    raw = []
    for part in joined.parts:
        with intact(f"dataset {joined.name!r} in {part.path!r}"):
            reason = hindrance(part.dataset, target, part.start)
        if reason is None:
            raw.append(part)
        else:
            _copy_decoded(output, part, target, memory, progress)
    # Last: HDF5 may keep what it was given to write, with what lies around it, and write that later.
    if len(raw) < len(joined.parts) or fill is not None:
        target.flush()
    for part in raw:
        copy_bytes(output, part.dataset, target, part.start, progress.advance)
    return target


def _created(output: Output, joined: Joined, storage: Storage, fill: Any) -> h5py.Dataset:
    if storage.chunked:
        return storage.create(output.file, joined.name, joined.shape, _kind(joined), fill=fill)
    if storage.given or joined.model.chunks is None or joined.dtype is not None:
        return _contiguous(output, joined, fill)
    target = _like_model(output, joined, fill)
    plists = [each.id.get_create_plist() for each in (joined.model, target)]
    filters = [filters_of(plist) for plist in plists]
    raw = all(hindrance(part.dataset, target, part.start) is None for part in joined.parts)
    if filters[0] != filters[1] or not (raw or {code for code, _ in filters[0]} <= _LOSSLESS):
        del output.file[joined.name]
        return _contiguous(output, joined, fill)
    return target


def _kind(joined: Joined) -> Any:
    """The type of the elements in the file: the model's own, which may be one that NumPy does not have."""
    return joined.dtype if joined.dtype is not None else joined.model.id.get_type().copy()


def _contiguous(output: Output, joined: Joined, fill: Any) -> h5py.Dataset:
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if not joined.model.dtype.hasobject:
        # Given its place at once, for bytes to be copied to, and not filled before that.
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return output.file.create_dataset(joined.name, joined.shape, _kind(joined), dcpl=plist, fillvalue=fill)


def _like_model(output: Output, joined: Joined, fill: Any) -> h5py.Dataset:
    """A dataset with the chunks and filters of the model, which also grows where the model does."""
    import h5py

    model = joined.model
    plist = model.id.get_create_plist()
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_INCR)
    filters = [plist.get_filter(place) for place in range(plist.get_nfilters())]
    without_filters(plist)
    for code, flags, values, _ in filters:
        there = h5py.h5z.filter_avail(code)
        # Bitshuffle puts three numbers before its parameters each time a dataset is made. A filter that is not there is not
        # needed to copy what went through it, which HDF5 believes of optional ones.
        values = values[3:] if code == _BITSHUFFLE and there else values
        plist.set_filter(code, flags if there else flags | h5py.h5z.FLAG_OPTIONAL, values)
    plist.set_obj_track_times(False)
    if fill is not None:
        plist.set_fill_value(np.array(fill))
    limits = tuple(h5py.h5s.UNLIMITED if most is None else size for most, size in zip(model.maxshape, joined.shape))
    try:
        # Not by h5py's own function, which would choose chunks and forget that partial ones are left unfiltered.
        space = h5py.h5s.create_simple(joined.shape, limits)
        output.file[joined.name] = h5py.Dataset(h5py.h5d.create(output.file.id, None, _kind(joined), space, plist))
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"dataset {joined.name!r} in {joined.parts[0].path!r} has a layout that cannot be written: {error}. "
            "Choose another: layout='contiguous'"
        ) from error
    return output.file[joined.name]


def _copy_decoded(output: Output, part: Part, target: h5py.Dataset, memory: int, progress: Progress) -> None:
    dataset = part.dataset
    where = f"dataset {dataset.name!r} in {dataset.file.filename!r}"
    for slab in slabs(dataset.shape, dataset.dtype.itemsize, memory, dataset.chunks):
        there = tuple(slice(first + side.start, first + side.stop) for first, side in zip(part.start, slab))
        with intact(where):
            block = dataset[slab]
        if block.dtype != target.dtype:
            block = _converted(block, target.dtype, where)
        base = numbers_in(dataset.dtype)
        if base is not None:
            for place in np.ndindex(block.shape):
                block[place] = righted(block[place], base)
            # To `target[there] = …`, sequences of one length are a matrix.
            target.write_direct(np.ascontiguousarray(block), None, there)
        else:
            target[there] = block
        output.check()
        progress.advance(int(block.size) * dataset.dtype.itemsize)


def _converted(block: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    wider = block.astype(dtype)
    # Integers above 2⁵³ are not all numbers of float64.
    if block.dtype.kind in "iu" and dtype.kind in "fc" and not np.array_equal(wider.real.astype(block.dtype), block):
        raise DataError(f"{where} has numbers that {dtype}, the dtype that all sources share, cannot hold: convert one of them")
    return wider


__all__ = ["Progress", "fill_value", "write_joined"]
