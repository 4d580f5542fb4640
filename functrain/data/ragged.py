"""Sequences of different lengths that lie end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.tree import Tree
from functrain.data.arguments import places
from functrain.data.arrays import arrays
from functrain.data.concat import spread
from functrain.data.runs import Runs
from functrain.data.source import Source


def ragged(values: Source | Tree, offsets: Any) -> Ragged:
    """A source of sequences that lie end to end: element i is the rows offsets[i] … offsets[i+1]−1 of `values`, `(T_i, …)`.

    - `values`: a source of rows, or a tree of arrays `(M, …)`.
    - `offsets` `(n+1,)`: ints that never fall, from 0 … M: an array, a tensor, a list, or a source of numbers, read at once.
      Elements may be empty, and rows before the first offset and from the last one on belong to none.

    `.lengths` `(n,)`, int64, are the T_i. Batches need `.padded(size)`, unless all lengths are the same; each is one read.
    Raises `ArgumentError` for offsets that are none.

    >>> import functrain as ft, torch
    >>> words = ft.ragged(torch.tensor([7, 8, 9, 5]), offsets=[0, 3, 3, 4])
    >>> [word.tolist() for word in words]
    [[7, 8, 9], [], [5]]
    """
    return Ragged(values if isinstance(values, Source) else arrays(values), _ints(offsets))


def _ints(offsets: Any) -> np.ndarray:
    """Offsets, however they came, as an array."""
    if isinstance(offsets, Source):
        offsets = offsets.take(np.arange(len(offsets.finite("offsets"))), 0)
    if isinstance(offsets, Tensor):
        offsets = offsets.detach().cpu().numpy()
    try:
        array = np.asarray(offsets)
    except ValueError:
        array = np.empty(0, object)
    if array.ndim != 1 or len(array) < 2 or array.dtype.kind not in "iu":
        what = f"shape {array.shape} and dtype {array.dtype}" if array.dtype.kind in "biufc" else repr(offsets)[:80]
        raise ArgumentError(f"offsets takes n+1 ints for n elements, at least 2 of them, got {what}")
    return array


def checked(offsets: np.ndarray, rows: int) -> np.ndarray:
    """Offsets into `rows` rows as int64; `ArgumentError` that names the first that is out of order or bounds."""
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falls):
        at = int(falls[0])
        raise ArgumentError(f"offsets must never fall: offset {at} is {offsets[at]}, offset {at + 1} is {offsets[at + 1]}")
    if offsets[0] < 0 or offsets[-1] > rows:
        raise ArgumentError(f"offsets must lie in 0 … {rows}, the number of rows, got {offsets[0]} … {offsets[-1]}")
    return offsets.astype(np.int64)


class Ragged(Source):
    """Stretches of rows of another source."""

    ragged = True
    sequences = True

    def __init__(self, values: Source, offsets: np.ndarray) -> None:
        rows = values.undeferred("ragged").finite("ragged").length
        if not rows:
            raise ArgumentError("ragged takes values that have rows, and these have none")
        self.values, self.inner = values, (values,)
        self.offsets = checked(offsets, rows)
        self.lengths = np.diff(self.offsets)
        self.length = len(self.lengths)

    def get(self, i: int, epoch: int) -> Tree:
        return self.elements(np.array([i]), epoch)[0]

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        indices = places(indices, len(self))
        lengths = self.lengths[indices]
        if (lengths != lengths[0]).any():
            raise TreeError(
                f"elements of {spread(lengths)} rows cannot be stacked: .padded({lengths.max()}) makes them alike, with a "
                "mask, before .batch"
            )
        shape = (len(indices), int(lengths[0]))
        return tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), self.rows(indices, epoch))

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        indices = places(indices, len(self))
        leaves, structure = tree.flatten(self.rows(indices, epoch))
        # Copies: an element that is kept must not keep those that were read with it.
        parts = [[part.clone() for part in leaf.split(self.lengths[indices].tolist())] for leaf in leaves]
        return [tree.unflatten(structure, element) for element in zip(*parts)]

    def rows(self, indices: np.ndarray, epoch: int) -> Tree:
        """The rows of the elements at `indices`, end to end: `(T, …)`."""
        starts, lengths = self.offsets[indices], self.lengths[indices]
        if not lengths.any():
            return tree.map(lambda leaf: leaf[:0], self.values.take(np.zeros(1, np.int64), epoch))
        # One read for all: picking 128 × 256 rows of 4 bytes took 0.08 ms, a read for each of the 128 stretches 6.5 ms.
        return self.values.take(_places(starts, lengths), epoch)

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        places = _places(self.offsets[indices], self.lengths[indices])
        if len(places):
            self.values.announce(places, epoch)

    def runs(self) -> Runs | None:
        runs = self.values.runs()
        if runs is None:
            return None
        # Elements belong to the run in which they begin; empty ones at the very end begin in none.
        ends = np.searchsorted(self.offsets[:-1], runs.ends(), "left")
        ends[-1] = len(self)
        return Runs.of(np.diff(ends, prepend=0), max(1, round(runs.size * float(self.lengths.mean()))))

    def facts(self) -> dict[str, str]:
        rows = self.offsets[-1] - self.offsets[0]
        return {**super().facts(), "lengths": f"{spread(self.lengths)} rows, {rows:,} in all of {self.values.length:,}"}


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of the rows of stretches, end to end."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]))


__all__ = ["Ragged", "checked", "ragged"]
