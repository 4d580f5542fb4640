"""Rows of chunked datasets, decoded chunk by chunk."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial

import numpy as np

from functrain.core.errors import DataError
from functrain.data.budget import Budget
from functrain.data.h5.cache import Cache
from functrain.data.h5.filters import DecodeError, Pipeline, ShortError
from functrain.data.h5.growing import Load
from functrain.data.h5.index import ChunkIndex
from functrain.data.h5.layout import LARGEST, Layout
from functrain.data.h5.pool import Pool
from functrain.data.h5.raw import Bytes, LocalBytes
from functrain.data.h5.scratch import RAW, scratch
from functrain.data.h5.through import Through
from functrain.data.rows import whole_run

# Stretches so many times their own length apart are still one after the other.
_BY_TURNS = 8


class Chunked:
    """Rows of a chunked dataset: its chunks are decoded once, kept while there is room, and gathered from.

    `load` brings a chunk: straight from the file (`Direct`), or through h5py (`Through.chunk`).
    """

    def __init__(self, layout: Layout, index: ChunkIndex, load: Load, budget: Budget, pool: Pool) -> None:
        self.layout, self._index = layout, index
        self.run = index.chunks[layout.axis]
        slots = max(1, min(len(index), budget.limit // index.bytes))
        self._cache = Cache(slots, index.bytes, budget, pool, load.chunk)
        self._load, self._pool = load, pool
        # Where the last stretch of neighbours ended.
        self._reached = 0
        others = [place for place in range(len(index.shape)) if place != layout.axis]
        # Chunks with the same rows, one behind the other along the other axes.
        self._beside = math.prod(index.grid[place] for place in others)
        # Whether a chunk is whole rows, one after the other: then many are gathered in one go.
        row = math.prod(index.shape[1:]) * index.itemsize
        self._whole = layout.axis == 0 and index.chunks[1:] == index.shape[1:] and row < LARGEST
        self._row = row if self._whole else 0
        self._void = np.dtype(f"V{self._row}")
        self._numbers = np.arange(len(index)).reshape(index.grid)

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            if self._whole:
                return self._stretch(where.start, where.stop)
            where = np.arange(where.start, where.stop)
        numbers, inner = np.divmod(where, self.run)
        wanted = np.unique(numbers)
        # Half of the places, so that another thread finds some too; all, where each chunk has its own.
        slots = self._cache.slots if self._cache.slots == len(self._index) else self._cache.slots // 2
        at_once = max(1, slots // self._beside)
        if self._whole and len(wanted) <= at_once:
            return self._rows(numbers, inner, wanted)
        shape = self.layout.row_shape
        result = np.empty((len(where), *shape), self.layout.dtype)
        for start in range(0, len(wanted), at_once):
            group = wanted[start : start + at_once]
            here = np.flatnonzero(np.isin(numbers, group))
            if self._whole:
                result[here] = self._rows(numbers[here], inner[here], group)
            else:
                self._pieces(result, here, numbers[here], inner[here], group)
        return result

    # --- whole rows ------------------------------------------------------------------------------------------

    def _stretch(self, start: int, stop: int) -> np.ndarray:
        """Neighbouring rows: chunks of which all is wanted are decoded into their place."""
        row = self._row
        result = np.empty((stop - start) * row, np.uint8)
        jobs, parts = [], []
        for number in range(start // self.run, (stop - 1) // self.run + 1):
            first = number * self.run
            low, high = max(first, start), min(first + self.run, stop)
            into = result[(low - start) * row : (high - start) * row]
            if high - low == self.run and not self._cache.has(number):
                jobs.append(partial(self._load.chunk, number, into))
            else:
                parts.append((number, slice((low - first) * row, (high - first) * row), into))
        if jobs:
            self._pool.all(jobs)
        for number, part, into in parts:
            # Who reads on from here comes back to this chunk in the next epoch: to keep it helps where all chunks can be kept.
            last = part.stop == self.run * row or number * self.run * row + part.stop == self.layout.length * row
            spent = last and self._cache.slots < len(self._index)
            if not self._cache.copied(number, part, into, spent) and not self._load.stored(number, part.start, into):
                with self._cache.holding([number], spent) as (memory, (place,)):
                    into[:] = self._data(memory, number, place)[part]
        # Last: what is wanted now has its place.
        self._read_ahead(start, stop)
        return result.view(self.layout.dtype).reshape(-1, *self.layout.row_shape)

    def _read_ahead(self, start: int, stop: int) -> None:
        """Where rows are read one stretch after the other: have the threads begin with the next chunks."""
        if self._pool.threads < 2:
            return
        reached, self._reached = self._reached, stop
        # Several may read by turns, and not in the order in which they set out.
        if abs(start - reached) <= _BY_TURNS * (stop - start):
            first = (stop - 1) // self.run + 1
            self._cache.announce(range(first, min(first + self._pool.threads, len(self._index))), spare=True)

    def _rows(self, numbers: np.ndarray, inner: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        with self._cache.holding(wanted.tolist()) as (memory, held):
            if None not in held:
                slots = np.array(held, np.int64)[np.searchsorted(wanted, numbers)]
                gathered = self._elements(memory.reshape(-1))[slots * self.run + inner]
            else:
                gathered = np.empty(len(numbers), self._void)
                for number, place in zip(wanted.tolist(), held):
                    here = numbers == number
                    gathered[here] = self._elements(self._data(memory, number, place))[inner[here]]
        return gathered.view(self.layout.dtype).reshape(-1, *self.layout.row_shape)

    def _data(self, memory: np.ndarray, number: int, place: int | None) -> np.ndarray:
        """The bytes of a chunk: those in its place, or, where there was none to be had, its own."""
        return self._cache.alone(number) if place is None else memory[place]

    def _elements(self, data: np.ndarray) -> np.ndarray:
        """Rows as single elements, which are gathered faster than rows of a matrix."""
        return data.view(self._void)

    # --- any other shape -------------------------------------------------------------------------------------

    def _pieces(
        self, result: np.ndarray, here: np.ndarray, numbers: np.ndarray, inner: np.ndarray, wanted: np.ndarray
    ) -> None:
        axis, index = self.layout.axis, self._index
        beside = np.moveaxis(self._numbers, axis, 0)
        # One grid row after the other, of at most so many chunks as there are places.
        most = max(1, self._cache.slots // 2)
        for number in wanted.tolist():
            mine = numbers == number
            into, rows = here[mine], inner[mine]
            chunks = beside[number].reshape(-1)
            for start in range(0, len(chunks), most):
                group = chunks[start : start + most].tolist()
                with self._cache.holding(group) as (memory, held):
                    for chunk, place in zip(group, held):
                        data = self._data(memory, chunk, place)
                        piece = np.moveaxis(data.view(self.layout.dtype).reshape(index.chunks), axis, 0)
                        region = index.region(chunk)
                        target = (*region[:axis], *region[axis + 1 :])
                        valid = tuple(slice(0, part.stop - part.start) for part in target)
                        result[(into, *target)] = piece[(slice(None), *valid)][rows]

    # --- ahead -----------------------------------------------------------------------------------------------

    def announce(self, indices: np.ndarray) -> None:
        run = whole_run(indices) if self._whole and indices.size else None
        if run is not None:
            self._cache.announce(range(run.start // self.run, (run.stop - 1) // self.run + 1))
            return
        wanted = np.unique(indices // self.run)
        if self._beside > 1:
            wanted = np.moveaxis(self._numbers, self.layout.axis, 0)[wanted].reshape(-1)
        self._cache.announce(wanted.tolist())


class Direct:
    """Chunks straight from the file: read, decoded, and read once more through h5py where that fails."""

    def __init__(self, layout: Layout, index: ChunkIndex, pipeline: Pipeline, file: Bytes, again: Through) -> None:
        self._layout, self._index, self._pipeline, self._file, self._again = layout, index, pipeline, file, again

    def chunk(self, number: int, out: np.ndarray) -> None:
        """The bytes of a chunk, whole: of one at the edge, what lies beyond the shape is padding."""
        offset = int(self._index.offset[number])
        if offset < 0:
            out.reshape(-1, self._index.itemsize)[:] = self._layout.fill
            return
        try:
            self._decode(number, offset, out)
        except (ShortError, DataError) as problem:
            # HDF5 takes such a chunk, and gives the memory behind what there is, or zeros behind the end of the file.
            raise self._damaged(number, offset, str(problem)) from problem
        except DecodeError as problem:
            self._once_more(number, offset, out, problem)

    def stored(self, number: int, start: int, out: np.ndarray) -> bool:
        """Read bytes from `start` on of a chunk that is stored as it is, without the others; whether it is."""
        offset, size = int(self._index.offset[number]), int(self._index.size[number])
        if offset < 0 or size != self._index.bytes or not isinstance(self._file, LocalBytes):
            return False
        if not self._pipeline.skipped(int(self._index.mask[number])):
            return False
        try:
            self._file.fill(offset + start, out)
        except DataError as problem:
            raise self._damaged(number, offset, str(problem)) from problem
        return True

    def trial(self, number: int, out: np.ndarray) -> str | None:
        """Decode a chunk that is there; what is wrong with it, if anything."""
        try:
            self._decode(number, int(self._index.offset[number]), out)
        except ShortError:
            raise
        except DecodeError as problem:
            return str(problem)
        return None

    def _decode(self, number: int, offset: int, out: np.ndarray) -> None:
        mask = int(self._index.mask[number])
        self._pipeline.decode(self._raw(offset, int(self._index.size[number]), mask, out), mask, out)

    def _raw(self, offset: int, size: int, mask: int, out: np.ndarray) -> bytes | memoryview:
        if not isinstance(self._file, LocalBytes):
            return self._file.read(offset, size)
        buffer = out if size == len(out) and self._pipeline.skipped(mask) else scratch.take(RAW, size)
        self._file.fill(offset, buffer)
        return buffer.data

    def _once_more(self, number: int, offset: int, out: np.ndarray, problem: Exception) -> None:
        try:
            self._again.chunk(number, out)
        except DataError as error:
            raise self._damaged(number, offset, f"{problem} (h5py: {error})") from problem

    def _damaged(self, number: int, offset: int, problem: str) -> DataError:
        return DataError(
            f"dataset {self._layout.name!r} in {self._layout.file!r} is damaged: chunk {self._index.coordinates(number)}, "
            f"{int(self._index.size[number])} bytes from byte {offset}, cannot be read: {problem}"
        )


def differing(index: ChunkIndex, direct: Direct, through: Through, edges: bool = True) -> str | None:
    """Why direct reading must not be used: an inner chunk, or one at the edge, comes out otherwise than through h5py.

    A chunk that h5py cannot read either is left for the reader to find.
    """
    for number in _samples(index, edges):
        with suppress(DataError, ShortError):
            problem = compared(index, direct, through, number)
            if problem is not None:
                return f"chunk {index.coordinates(number)}: {problem}"
    return None


def compared(index: ChunkIndex, direct: Direct, through: Through, number: int) -> str | None:
    """What is wrong with a chunk as it is read directly; `DataError` or `ShortError` where there is nothing to compare with."""
    ours, theirs = np.zeros(index.bytes, np.uint8), np.zeros(index.bytes, np.uint8)
    through.chunk(number, theirs)
    problem = direct.trial(number, ours)
    if problem is not None:
        return problem
    valid = tuple(slice(0, part.stop - part.start) for part in index.region(number))
    first, second = (data.reshape(*index.chunks, index.itemsize)[valid] for data in (ours, theirs))
    held = _held(through.layout.dtype)
    same = np.array_equal(first, second) or np.array_equal(first[..., held], second[..., held])
    return None if same else "its numbers are others than h5py's"


def _held(dtype: np.dtype) -> np.ndarray:
    """Which bytes of an element hold numbers, bool `(itemsize,)`: not those between the fields of a compound."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.tile(_held(base), math.prod(shape))
    held = np.full(dtype.itemsize, dtype.names is None)
    for field, offset, *_ in (dtype.fields or {}).values():
        held[offset : offset + field.itemsize] |= _held(field)
    return held


def _samples(index: ChunkIndex, edges: bool) -> list[int]:
    """The first and the last of the inner chunks that are there, and of those at the edge."""
    there, edge = index.offset >= 0, index.edges
    kinds = [np.flatnonzero(there & ~edge), np.flatnonzero(there & edge & edges)]
    return sorted({int(number) for kind in kinds for number in (*kind[:1], *kind[-1:])})
