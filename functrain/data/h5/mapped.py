"""Rows of datasets whose numbers stand in the file as they are."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

from functrain.core.errors import DataError
from functrain.data.budget import Account, Budget
from functrain.data.forks import renew
from functrain.data.h5.faults import GuardedMap
from functrain.data.h5.files import dataset_of, found, opened
from functrain.data.h5.layout import LARGEST, Layout, layout_of
from functrain.data.h5.raw import LocalBytes


class Region:
    """A stretch of a file in memory, read-only, for as long as the budget has room for all of it."""

    def __init__(self, file: LocalBytes, start: int, stop: int, budget: Budget, name: str) -> None:
        self._file, self._budget, self._stop, self._name = file, budget, stop, name
        self._memory, skipped = file.map(start, stop)
        self._mapping = GuardedMap(self._memory)
        self.bytes = np.frombuffer(self._memory, np.uint8, stop - start, skipped)
        # All bytes are counted against the budget, or none.
        self._account, self._used_at = Account(budget), 0
        self._lock = threading.Lock()
        budget.on_pressure(self)
        renew(self)

    def after_fork(self) -> None:
        """In a forked process: nothing is held, and nobody holds the lock."""
        self._account, self._lock = Account(self._budget), threading.Lock()

    def usable(self) -> bool:
        """Whether the stretch may be read here. Else it is to be read from the file: `check` has been made of its length."""
        self._check()
        if not self._account.items:
            # One page that is looked at brings others, hundreds of KiB with some systems: so all are counted.
            size = len(self._memory)
            # Without the lock: others are evicted, which may want room from this one.
            if not self._account.begin(size, asker=self):
                return False
            with self._lock:
                if self._account.items > 1:
                    self._account.end(size)
        self._used_at = self._budget.now()
        return True

    def gathered(self, gather: Callable[[], np.ndarray]) -> np.ndarray:
        """What `gather` copies out of the stretch; `DataError` where the file has become shorter by the end."""
        try:
            with self._mapping:
                found = gather()
        except BaseException:
            # A Ctrl-C during the read comes at the first step after it, which may be that of ending it.
            self._mapping.__exit__()
            raise
        self._check()
        return found

    def fill(self, offset: int, buffer: np.ndarray) -> None:
        """Bytes of the stretch by way of the file, and not of memory; `DataError` where it has become shorter."""
        try:
            self._file.fill(offset, buffer)
        except DataError:
            self._check()
            raise

    def _check(self) -> None:
        # Behind the end of the file stand zeros up to the end of a page, so to have met no fault is not enough: 0.3 µs.
        self._file.check(self._stop, self._name)
        if self._mapping.cut:
            raise self._file.shrunk(self._name)

    def oldest(self) -> int | None:
        """When it was last used; the budget compares."""
        return self._used_at if self._account.items else None

    def evict(self, size: int) -> None:
        """Let go of all pages: they come again from the system's cache when they are looked at."""
        with self._lock:
            if self._account.items:
                self._memory.madvise(mmap.MADV_DONTNEED)
                self._account.settle()


class Mapped:
    """Rows of a dataset whose numbers stand in the file as they are: contiguous, or in chunks of whole rows without a filter.

    A row is `before` pieces of `piece` bytes (one, but for another sample axis than the first). Rows at scattered places come
    out of a map of the file while that fits into the budget; neighbours, and what does not fit, are read into place.
    """

    run = 1

    def __init__(self, layout: Layout, file: LocalBytes, budget: Budget) -> None:
        self.layout, self._file = layout, file
        self._before = math.prod(layout.shape[: layout.axis])
        self._piece = layout.size // (self._before * layout.length)
        if layout.index is None:
            assert layout.offset is not None
            self._origins, self._stretch = np.array([layout.offset]), layout.length
            stop = layout.offset + layout.size
        else:
            self._origins, self._stretch = layout.index.offset, layout.index.chunks[0]
            stop = int(self._origins.max()) + layout.index.bytes
        self._start = int(self._origins.min())
        self._region = Region(file, self._start, stop, budget, layout.name)
        # A piece may begin at any byte, so each byte is the beginning of an element here; one by one, pieces are gathered
        # faster than as rows of a matrix.
        self._elements = None
        if self._piece < LARGEST:
            size = len(self._region.bytes) - self._piece + 1
            self._elements = np.ndarray((size,), np.dtype(f"V{self._piece}"), self._region.bytes, strides=(1,))
        # Where rows follow one another without a gap, there is no place to be computed.
        alone = self._before == 1 and len(self._origins) == 1
        self._matrix = self._region.bytes[: layout.size].reshape(-1, self._piece) if alone else None

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        pieces = self._neighbours(where.start, where.stop) if isinstance(where, slice) else self._scattered(where)
        rows = pieces.view(self.layout.dtype).reshape(*self.layout.shape[: self.layout.axis], -1, *self._behind)
        return np.ascontiguousarray(np.moveaxis(rows, self.layout.axis, 0)) if self.layout.axis else rows

    @property
    def _behind(self) -> tuple[int, ...]:
        return self.layout.shape[self.layout.axis + 1 :]

    def _starts(self, rows: np.ndarray) -> np.ndarray:
        """Where the pieces of these rows begin in the file, `before` by `before`."""
        if len(self._origins) > 1:
            stretches, rows = np.divmod(rows, self._stretch)
            return self._origins[stretches] + rows * self._piece
        starts = self._start + rows * self._piece
        if self._before == 1:
            return starts
        return (np.arange(self._before)[:, None] * (self._stretch * self._piece) + starts).reshape(-1)

    def _neighbours(self, start: int, stop: int) -> np.ndarray:
        """The pieces of neighbouring rows: each stretch of them by one read."""
        if self._before == 1 and start // self._stretch == (stop - 1) // self._stretch:
            alone = np.empty((stop - start) * self._piece, np.uint8)
            self._region.fill(int(self._origins[start // self._stretch]) + start % self._stretch * self._piece, alone)
            return alone
        cuts = [start, *range((start // self._stretch + 1) * self._stretch, stop, self._stretch), stop]
        result = np.empty((self._before, (stop - start) * self._piece), np.uint8)
        for first, last in itertools.pairwise(cuts):
            into = result[:, (first - start) * self._piece : (last - start) * self._piece]
            for place, offset in enumerate(self._starts(np.array([first])).tolist()):
                self._region.fill(offset, into[place])
        return result.reshape(-1)

    def _scattered(self, rows: np.ndarray) -> np.ndarray:
        usable, matrix, elements = self._region.usable(), self._matrix, self._elements
        if usable and matrix is not None:
            # They lie within it, as was checked; so none is cut off, and none is looked at twice.
            return self._region.gathered(lambda: matrix.take(rows, axis=0, mode="clip")).reshape(-1)
        starts = self._starts(rows)
        if usable and elements is not None:
            return self._region.gathered(lambda: elements[starts - self._start])
        result = np.empty((len(starts), self._piece), np.uint8)
        for place, start in zip(result, starts.tolist()):
            self._region.fill(start, place)
        return result.reshape(-1)

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
        raise DataError(
            f"dataset {layout.name!r} in {path!r} cannot be memory-mapped. It is {_apart(layout)}. ft.hdf5 reads it"
        )
    return np.memmap(layout.file, layout.dtype, "r", layout.offset, layout.shape)


def _apart(layout: Layout) -> str:
    """Why the bytes of a dataset are not an array as they lie in the file."""
    if layout.index is None or layout.pipeline is None:
        return layout.reason.removesuffix(": read through h5py")
    text = f"stored in chunks of {'x'.join(map(str, layout.index.chunks))}"
    if layout.pipeline.plain:
        return f"{text}, which may lie anywhere in the file, and an np.memmap shows a single stretch of it"
    return f"{text}, encoded with {layout.pipeline}, and an np.memmap shows bytes as they are in the file"
