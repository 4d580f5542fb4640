"""Sources whose elements are found in several others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from functrain.core.tree import Tree
from functrain.data.source import Source
from functrain.data.stacking import joined


class Gathered(Source):
    """Elements of several `streams`: `found` says in which each stands, and where.

    Elements at scattered positions are read with one `take` of each stream.
    """

    streams: Sequence[Source]

    def found(self, indices: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of the stream that each element is in, and its position there."""
        raise NotImplementedError

    def get(self, i: int, epoch: int) -> Tree:
        numbers, inside = self.found(np.array([i]), epoch)
        return self.streams[int(numbers[0])].get(int(inside[0]), epoch)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        groups = self._groups(indices, epoch)
        return joined(len(indices), ((self.name(k), places, self.streams[k].take(at, epoch)) for k, places, at in groups))

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        listed: list[Tree] = [None] * len(indices)
        for number, places, inside in self._groups(indices, epoch):
            for place, element in zip(places.tolist(), self.streams[number].elements(inside, epoch)):
                listed[place] = element
        return listed

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        for number, _, inside in self._groups(indices, epoch):
            self.streams[number].announce(inside, epoch)

    def name(self, number: int) -> str:
        """What errors call a stream."""
        return f"source {number}"

    def _groups(self, indices: np.ndarray, epoch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each stream that has some of the elements: its number, their places in `indices`, and in the stream."""
        numbers, inside = self.found(indices, epoch)
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        for number, places in zip(ordered[starts].tolist(), np.split(order, starts[1:])):
            yield number, places, inside[places]
