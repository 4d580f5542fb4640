"""Neighbouring elements that are cheapest read together, such as the rows of a chunk."""

from __future__ import annotations

from typing import NamedTuple


class Runs(NamedTuple):
    """How a source's elements lie: stretch after stretch of `(length, step)`, each cut into runs of `step` elements.

    The last run of a stretch holds what is left. `size` is the size of an element in bytes, decoded.

    >>> Runs(((10, 4), (3, 8)), 100).number
    4
    """

    stretches: tuple[tuple[int, int], ...]
    size: int

    @property
    def number(self) -> int:
        """How many runs there are."""
        return sum(-(-length // step) for length, step in self.stretches)
