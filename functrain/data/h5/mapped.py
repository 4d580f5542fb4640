"""Rows of contiguous datasets, out of a map of the file into memory."""

from __future__ import annotations

import math
import mmap
import os
import threading

import numpy as np

from functrain.core.errors import DataError
from functrain.data.budget import Budget
from functrain.data.h5.files import dataset_of, found, intact, opened
from functrain.data.h5.index import ChunkIndex
from functrain.data.h5.layout import Layout, layout_of


class Map:
    """A whole file in memory, read-only, of which at most the budget's bytes stay."""

    def __init__(self, path: str, budget: Budget) -> None:
        self.path, self._budget = path, budget
        with intact(repr(path)), open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Bytes of pages in memory, and since when: pages are let go of all at once.
        self._held = self._since = 0
        self._lock = threading.Lock()
        budget.on_pressure(self)

    def __del__(self) -> None:
        self._budget.release(self._held)

    def check(self, end: int, name: str) -> None:
        """Raise `DataError` if the file has become shorter than `end` bytes."""
        # Reading a page past the end of the file kills the process (SIGBUS): ask for its size first, at 0.3 µs.
        size = self.memory.size()
        if size < end:
            raise DataError(f"{self.path!r} shrank to {size} bytes since it was opened; dataset {name!r} needs {end}")

    def touch(self, places: int, size: int) -> None:
        """Count the pages that come into memory with `places` pieces of `size` bytes each, before they are read."""
        whole = len(self.memory)
        if self._held >= whole:
            return
        # The system maps the pages around one that is asked for too, 64 KiB in all.
        new = min(places * (size + _AROUND), whole - self._held)
        if not self._budget.reserve(new, self):
            self.evict(whole)
            self._budget.charge(new)
        with self._lock:
            self._since = self._since if self._held else self._budget.now()
            self._held += new

    def oldest(self) -> int | None:
        """Since when there are pages in memory; the budget compares."""
        return self._since if self._held else None

    def evict(self, size: int) -> None:
        """Let go of all pages: they come again from the system's cache when they are looked at."""
        with self._lock:
            held, self._held = self._held, 0
            if held:
                self.memory.madvise(mmap.MADV_DONTNEED)
        self._budget.release(held)


_AROUND = 1 << 16


class Mapped:
    """Rows of a contiguous dataset, copied out of the map."""

    run = 1

    def __init__(self, memory: Map, layout: Layout) -> None:
        assert layout.offset is not None
        self._memory, self.layout = memory, layout
        self._end = layout.offset + layout.size
        memory.check(self._end, layout.name)
        # As bytes: a dataset may begin at an odd offset, and np.take would copy an unaligned array whole.
        flat = np.frombuffer(memory.memory, np.uint8, layout.size, layout.offset)
        self._bytes = flat.reshape(*layout.shape[: layout.axis + 1], -1)

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        self._memory.check(self._end, self.layout.name)
        axis = self.layout.axis
        piece = self._bytes.shape[-1]
        if isinstance(where, slice):
            self._memory.touch(self._before, piece * (where.stop - where.start))
            rows = self._bytes[(slice(None),) * axis + (where,)].copy()
        else:
            self._memory.touch(self._before * len(where), piece)
            rows = self._bytes.take(where, axis)
        if axis:
            rows = np.ascontiguousarray(np.moveaxis(rows, axis, 0))
        return rows.view(self.layout.dtype).reshape(-1, *self.layout.row_shape)

    @property
    def _before(self) -> int:
        return math.prod(self.layout.shape[: self.layout.axis])

    def announce(self, indices: np.ndarray) -> None:
        """Nothing to do: the system reads ahead."""


class MappedChunks:
    """Rows of a dataset whose chunks are whole rows without a filter, copied out of the map."""

    def __init__(self, memory: Map, layout: Layout, index: ChunkIndex) -> None:
        self._memory, self.layout, self._index = memory, layout, index
        self.run = 1
        self._chunk = index.chunks[0]
        self._row = layout.size // layout.length
        self._end = int(index.offset.max()) + index.bytes
        memory.check(self._end, layout.name)
        # A row may begin at any byte: each byte is the beginning of an element of this array.
        self._elements = np.ndarray(
            (len(memory.memory) - self._row + 1,), np.dtype(f"V{self._row}"), memory.memory, strides=(1,)
        )

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        self._memory.check(self._end, self.layout.name)
        if isinstance(where, slice):
            where = np.arange(where.start, where.stop)
        self._memory.touch(len(where), self._row)
        numbers, inner = np.divmod(where, self._chunk)
        picked = self._elements[self._index.offset[numbers] + inner * self._row]
        return picked.view(self.layout.dtype).reshape(-1, *self.layout.row_shape)

    def announce(self, indices: np.ndarray) -> None:
        """Nothing to do: the system reads ahead."""


def readmmap(path: str | os.PathLike[str], dataset: str) -> np.ndarray:
    """A dataset as a read-only `np.memmap`: nothing is read until it is looked at.

    Raises `DataError` with the reason where it cannot be mapped (chunked, compact, virtual …).

    >>> import functrain as ft, numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"x": np.arange(4)})
    >>> ft.readmmap(folder.name + "/a.h5", "x")[2:].tolist()
    [2, 3]
    >>> folder.cleanup()
    """
    path = os.fspath(path)
    with opened(path) as file:
        layout = layout_of(dataset_of(found(file, path, dataset), path, dataset), path, dataset)
    if layout.way != "mmap" or layout.offset is None:
        raise DataError(f"dataset {layout.name!r} in {path!r} cannot be memory-mapped. It is {layout.reason}; hdf5() does")
    return np.memmap(layout.file, layout.dtype, "r", layout.offset, layout.shape)
