"""Sources whose elements are made from other elements: batch, map, zip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, PositionError, TreeError
from functrain.core.tree import Tree
from functrain.data.arguments import BOUND
from functrain.data.positions import EndedError
from functrain.data.runs import Runs
from functrain.data.source import Source
from functrain.data.stacking import stacked


class Batch(Source):
    """Neighbouring elements, stacked."""

    def __init__(self, source: Source, size: int, drop_last: bool) -> None:
        self.source, self.inner, self.size, self.drop_last = source, (source,), size, drop_last
        rows = source.length
        self.rest = 0 if rows is None else rows % size
        self.length = None if rows is None else rows // size if drop_last else -(-rows // size)
        self.dropped = self.rest if drop_last else 0
        self._ragged = (self.rest > 0 or source.ending) and not drop_last
        if rows and not self.length:
            raise ArgumentError(f"drop_last leaves no batch: {rows} elements, batches of {size}")

    @property
    def ragged(self) -> bool:
        return self._ragged

    def places(self, i: int) -> range:
        """Where in the inner source the elements of batch i stand."""
        stop = (i + 1) * self.size
        if stop >= BOUND:
            raise PositionError(f"batch {i} of {self.size} elements ends beyond position 2⁶³, and no run comes that far")
        return range(i * self.size, stop if self.source.length is None else min(stop, self.source.length))

    def get(self, i: int, epoch: int) -> Tree:
        places = self.places(i)
        if self.source.ending:
            return self._up_to_the_end(places, epoch)
        return self.source.take(np.arange(places.start, places.stop), epoch)

    def _up_to_the_end(self, places: range, epoch: int) -> Tree:
        """A batch of what may end within it, read one by one: what was read before the end cannot always be read again."""
        elements = []
        for place in places:
            try:
                elements.append(self.source.get(place, epoch))
            except EndedError:
                if self.drop_last or not elements:
                    raise
                break
        return stacked(elements)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        rows = self.source.length
        if self.source.ending or (rows is not None and (int(indices.max()) + 1) * self.size > rows):
            return super().take(indices, epoch)
        # Whole batches: one read for all of them.
        first = self.places(0)
        self.places(int(indices.max()))
        places = (indices[:, None] * self.size + np.arange(first.start, first.stop)).reshape(-1)
        shape = (len(indices), len(first))
        return tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), self.source.take(places, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        places = [np.arange(each.start, each.stop) for each in map(self.places, indices.tolist())]
        self.source.announce(places[0] if len(places) == 1 else np.concatenate(places), epoch)

    def facts(self) -> dict[str, str]:
        count = {"batches": "endless" if self.length is None else f"{self.length:,} of {self.size}"}
        if self.dropped:
            return {**count, "last": f"{self.dropped} elements left over, dropped"}
        if self.source.ending:
            return {**count, "last": "dropped if ragged" if self.drop_last else "what is left where the source ends"}
        return {**count, "last": f"ragged: {self.rest} elements" if self.rest else "full"}


class Map(Source):
    """A function of every element."""

    # What a function makes of elements is not known before it is called.
    ragged = True

    def __init__(self, source: Source, fn: Callable[[Any], Tree]) -> None:
        self.source, self.inner, self.length, self.fn = source, (source,), source.length, fn

    def get(self, i: int, epoch: int) -> Tree:
        return tree.map(as_tensor, self.fn(self.source.get(i, epoch)))

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return stacked(self.elements(indices, epoch))

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        # One read below; the function sees one element at a time, as it does in `get`.
        return [tree.map(as_tensor, self.fn(element)) for element in self.source.elements(indices, epoch)]

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.source.announce(indices, epoch)

    def runs(self) -> Runs | None:
        return self.source.runs()

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "function": getattr(self.fn, "__qualname__", type(self.fn).__name__)}


def as_tensor(leaf: Any, what: str = "a mapped function") -> Tensor:
    """A leaf that the function `what` returned as a tensor; `TreeError` for one that is none, no array and no number."""
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, np.ndarray) and not leaf.flags.writeable:
        # torch would share memory that nobody may write to, such as an image's.
        return torch.from_numpy(leaf.copy())
    if isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic)):
        return torch.as_tensor(leaf)
    raise TreeError(f"{what} returned a leaf of type {type(leaf).__name__}: expected tensors, arrays, numbers")


class Zip(Source):
    """Sources side by side."""

    def __init__(self, *sources: Source) -> None:
        for source in sources:
            if not isinstance(source, Source):
                raise ArgumentError(f"zip takes sources, got {type(source).__name__}: see functrain.arrays")
            source.undeferred("zip")
        lengths = [source.length for source in sources]
        if len(sources) < 2:
            raise ArgumentError("zip takes at least one other source")
        if len(set(lengths)) > 1:
            listed = ", ".join("endless" if length is None else str(length) for length in lengths)
            raise ArgumentError(f"zip takes sources of one length, got {listed}")
        self.inner, self.length = sources, lengths[0]

    def get(self, i: int, epoch: int) -> Tree:
        return tuple(source.get(i, epoch) for source in self.inner)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return tuple(source.take(indices, epoch) for source in self.inner)

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        return list(zip(*(source.elements(indices, epoch) for source in self.inner)))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        for source in self.inner:
            source.announce(indices, epoch)

    def runs(self) -> Runs | None:
        known = [runs for source in self.inner if (runs := source.runs()) is not None]
        # The coarser: a run of it costs the most to read in two.
        return min(known, key=lambda runs: runs.number)._replace(size=sum(runs.size for runs in known)) if known else None
