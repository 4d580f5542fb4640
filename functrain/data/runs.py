"""Neighbouring elements that are cheapest read together, such as the rows of a chunk."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """How a source's elements lie: stretch after stretch of `(length, step)`, each cut into runs of `step` elements.

    The last run of a stretch holds what is left. `size` is the size of an element in bytes, decoded.

    >>> Runs(((10, 4), (3, 8)), 100).number
    4
    """

    stretches: tuple[tuple[int, int], ...]
    size: int

    @classmethod
    def of(cls, counts: np.ndarray, size: int) -> Runs | None:
        """Runs of so many elements each, some perhaps of none; None where each element lies alone.

        >>> Runs.of(np.array([4, 4, 0, 2]), 100).stretches
        ((8, 4), (2, 2))
        """
        alike = [(count, sum(1 for _ in group)) for count, group in itertools.groupby(counts[counts > 0].tolist())]
        if all(count == 1 for count, _ in alike):
            return None
        return cls(tuple((count * number, count) for count, number in alike), size)

    @property
    def number(self) -> int:
        """How many runs there are."""
        return sum(-(-length // step) for length, step in self.stretches)

    @property
    def length(self) -> int:
        """How many elements there are."""
        return sum(length for length, _ in self.stretches)

    def ends(self) -> np.ndarray:
        """Where each run ends, `(number,)` int64.

        >>> Runs(((10, 4), (3, 8)), 100).ends().tolist()
        [4, 8, 10, 13]
        """
        ends, first = [np.empty(0, np.int64)], 0
        for length, step in self.stretches:
            ends.append(first + np.minimum(np.arange(step, length + step, step), length))
            first += length
        return np.concatenate(ends)

    def between(self, start: int, stop: int) -> Runs:
        """How the elements from `start` to `stop` lie: the first and the last run may be cut.

        >>> Runs(((10, 4), (3, 8)), 100).between(2, 12).stretches
        ((2, 2), (6, 4), (2, 8))
        """
        kept = []
        first = 0
        for length, step in self.stretches:
            low, high = max(start - first, 0), min(stop - first, length)
            cut = min(-low % step, high - low)
            if cut > 0:
                kept.append((cut, cut))
                low += cut
            if high > low:
                kept.append((high - low, step))
            first += length
        return Runs(tuple(kept), self.size)
