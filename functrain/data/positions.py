"""What every source is: elements by position, read, counted and explained."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset

from functrain.core import tree
from functrain.core.errors import ArgumentError, PositionError
from functrain.core.explain import Stage
from functrain.core.tree import Tree
from functrain.data.arguments import BOUND
from functrain.data.runs import Runs
from functrain.data.stacking import stacked


class EndedError(PositionError):
    """An iteration of unknown length is over: raised by `get` beyond it, and what ends a `for`."""


class LengthlessError(ArgumentError, TypeError):
    """A length is asked for that nobody knows: as a `TypeError` it lets `list(source)` go on without."""


class Positions(Dataset[Any]):
    """What a source is before anything is made of it; see `Source`."""

    length: int | None

    def get(self, i: int, epoch: int) -> Tree:
        """Element i of an epoch, unchecked: what a source has to define."""
        raise NotImplementedError(f"{type(self).__name__} has to define get(i, epoch)")

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        """The elements at `indices` in an epoch, stacked, unchecked as by `get`: for sources that stand on this one.

        A source that can read them at once defines this too. To read several from outside, `batch` them.
        """
        return stacked([self.get(i, epoch) for i in indices.tolist()])

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        """The elements at `indices` in an epoch, each by itself: read at once where that can be, and of any shapes."""
        if self.ragged:
            return [self.get(i, epoch) for i in indices.tolist()]
        return tree.unstack(self.take(indices, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        """The elements at `indices` will be taken soon: begin with what can be done ahead. Never waits; nothing by default."""

    @property
    def heeding(self) -> bool:
        """Whether `announce` is of any use: by default where a source that stands on no other defines it."""
        if self.inner:
            return any(source.heeding for source in self.inner)
        return type(self).announce is not Positions.announce

    def runs(self) -> Runs | None:
        """Which neighbours are cheapest read together; None where each element lies alone."""
        return None

    # What it stands on, for explain() and to know whether its order changes with the epoch.
    inner: Sequence[Positions] = ()

    @property
    def steady(self) -> bool:
        """Whether every epoch has the same elements in the same order."""
        return all(source.steady for source in self.inner)

    @property
    def deferring(self) -> bool:
        """Whether elements are `Deferred`: a source of your own that gives such sets it to True."""
        return any(source.deferring for source in self.inner)

    @property
    def ragged(self) -> bool:
        """Whether elements may differ in shape, so that `take` need not fit: a source of your own with such sets it to True."""
        return any(source.ragged for source in self.inner)

    @property
    def sequences(self) -> bool:
        """Whether elements are whole sequences, which windows would stack instead of cutting."""
        return any(source.sequences for source in self.inner)

    @property
    def ending(self) -> bool:
        """Whether it ends where nobody knows before it is read: `get` beyond it raises `EndedError`."""
        return self.length is None and any(source.ending for source in self.inner)

    def explain(self) -> Stage:
        """What this source reads, in which order, and what it stands on."""
        return Stage(type(self).__name__.lower(), self.facts(), [source.explain() for source in self.inner])

    def facts(self) -> dict[str, str]:
        """The lines of `explain`: the length first."""
        return {"length": "endless" if self.length is None else f"{self.length:,}"}

    # --- reading ---------------------------------------------------------------------------------------------

    def __call__(self, i: int) -> Tree:
        """Element i of the first epoch; `PositionError` outside 0 … length−1."""
        try:
            place = operator.index(i)
        except TypeError:
            what = "the slice" if isinstance(i, slice) else f"{type(i).__name__}"
            raise TypeError(
                f"positions of a source are ints, got {what} {i!r}: parts of it come of .split, fields of its elements of "
                ".map, as in source.map(lambda element: element['x']), and several at once of .batch"
            ) from None
        if not self._has(place):
            raise PositionError(self._outside(place))
        return self.get(place, 0)

    def _has(self, place: int) -> bool:
        return 0 <= place < (BOUND if self.length is None else min(self.length, BOUND))

    def _outside(self, place: int) -> str:
        if place >= BOUND and (self.length is None or self.length > BOUND):
            return f"position {place} is beyond 2⁶³ − 1, the last that there can be"
        if self.length is None:
            return f"position {place} is negative: positions count from 0"
        held = f"positions run from 0 to {self.length - 1}" if self.length else "it has no elements"
        more = "" if place < 0 else "; source.repeat() goes on with the next epoch"
        return f"position {place} lies outside a source of length {self.length}: {held}{more}"

    def __len__(self) -> int:
        if self.length is None:
            if self.ending:
                raise LengthlessError("the length of this source is not known before its end: functrain.source(data, length=n)")
            raise ArgumentError("this source has no end, so no len(): see source.length, which is None")
        return self.length

    def __getitem__(self, i: int) -> Tree:
        """Element i of the first epoch, as `source(i)`; `PositionError`, an `IndexError`, outside 0 … length−1."""
        return self(i)

    def __getitems__(self, indices: Sequence[int]) -> list[Tree]:
        """The elements at `indices`, as a DataLoader asks for those of a batch: read at once where that can be."""
        places = [operator.index(i) for i in indices]
        for place in places:
            if not self._has(place):
                raise PositionError(self._outside(place))
        if self.deferring or not places:
            return [self.get(place, 0) for place in places]
        return self.elements(np.array(places, np.int64), 0)

    def __bool__(self) -> bool:
        return self.length != 0

    def __iter__(self) -> Iterator[Tree]:
        """The elements of one epoch, in order; without a length, as many as there are."""
        for place in itertools.count() if self.length is None else range(self.length):
            try:
                element = self.get(place, 0)
            except EndedError:
                if self.length is not None:
                    raise
                return
            yield element

    def __repr__(self) -> str:
        return f"<source {self.explain().title}, length {'endless' if self.length is None else self.length}>"

    # --- what others need of it -------------------------------------------------------------------------------

    def undeferred(self, purpose: str) -> Self:
        """This source; `ArgumentError` if its batches are deferred, where `purpose` needs examples."""
        if self.deferring:
            raise ArgumentError(
                f"{purpose} needs examples, and these batches are deferred: {purpose} first, then .batch(…).deferred(); "
                "or have them read whole, source.drawn()"
            )
        return self

    def finite(self, purpose: str) -> Self:
        """This source; `ArgumentError` if it has no end, which `purpose` needs."""
        if self.ending:
            raise ArgumentError(f"{purpose} needs a length, which this source has not: functrain.source(data, length=n)")
        if self.length is None:
            raise ArgumentError(f"{purpose} needs a source with an end: {purpose} first, then repeat()")
        return self
