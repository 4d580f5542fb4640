"""Datasets that are written batch by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.data.h5.chunking import Storage
from functrain.data.h5.output import Output
from functrain.data.h5.slabs import slabs

if TYPE_CHECKING:
    import h5py

# Written at once: after each such piece, a full disk or a Ctrl-C ends the writing.
_AT_ONCE = 1 << 26


class Appended:
    """A dataset whose rows come one block after another; whole chunks are written, so that each is encoded once.

    `length` is None where nobody knows how many rows will come: then the dataset grows.
    """

    def __init__(self, output: Output, storage: Storage, name: str, first: np.ndarray, length: int | None) -> None:
        self.name, self.written = name, 0
        self._output, self._length = output, length
        self._row, self._dtype = first.shape[1:], first.dtype
        shape = (0 if length is None else length, *self._row)
        self._dataset = storage.create(output.file, name, shape, first.dtype, grows=length is None)
        self._chunk = 1 if self._dataset.chunks is None else self._dataset.chunks[0]
        self._waiting: list[np.ndarray] = []
        self._rows = 0

    def append(self, rows: np.ndarray, number: int) -> None:
        """Write the rows of batch `number`, or keep them until a chunk is full."""
        if rows.shape[1:] != self._row or rows.dtype != self._dtype:
            raise ArgumentError(
                f"batch {number} has {self.name!r} as {rows.shape} {rows.dtype}: the first has rows {self._row} {self._dtype}"
            )
        # A copy of what is kept: the next batch may come in the same memory.
        self._rows += len(rows)
        whole = self._rows - self._rows % self._chunk
        if not whole:
            self._waiting.append(rows.copy())
            return
        cut = len(rows) - (self._rows - whole)
        self._write([*self._waiting, rows[:cut]])
        self._waiting = [rows[cut:].copy()] if cut < len(rows) else []
        self._rows -= whole

    def end(self) -> None:
        """Write what is left."""
        self._write(self._waiting)
        self._waiting, self._rows = [], 0

    def _write(self, blocks: list[np.ndarray]) -> None:
        rows = blocks[0] if len(blocks) == 1 else np.concatenate(blocks) if blocks else np.empty((0, *self._row), self._dtype)
        start, self.written = self.written, self.written + len(rows)
        if self._length is None:
            self._dataset.resize(self.written, axis=0)
        fill(self._output, self._dataset, rows, start)


def fill(output: Output, dataset: h5py.Dataset, array: np.ndarray, start: int = 0) -> None:
    """Write `array` into a dataset, from row `start` on, in pieces of bounded size."""
    for slab in slabs(array.shape, array.itemsize, _AT_ONCE, dataset.chunks):
        there: Any = slab
        if slab:
            there = (slice(slab[0].start + start, slab[0].stop + start), *slab[1:])
        dataset.write_direct(np.ascontiguousarray(array[slab]), None, there)
        output.check()


__all__ = ["Appended", "fill"]
