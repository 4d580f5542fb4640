"""Sources that change which element stands where: shuffle, shard, split, repeat, epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np

from functrain.core.errors import ArgumentError, PositionError
from functrain.core.tree import Tree
from functrain.data.arguments import BOUND
from functrain.data.permutation import permuted
from functrain.data.runs import Runs
from functrain.data.source import Source
from functrain.data.stacking import joined


class Reordered(Source):
    """A source over the elements of another, at other positions: `indices` says which."""

    def __init__(self, source: Source, length: int | None) -> None:
        self.source, self.inner, self.length = source, (source,), length

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Where in the inner source the elements at `positions` stand."""
        raise NotImplementedError

    def get(self, i: int, epoch: int) -> Tree:
        return self.source.get(int(self.indices(np.array([i]), epoch)[0]), epoch)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return self.source.take(self.indices(indices, epoch), epoch)

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        return self.source.elements(self.indices(indices, epoch), epoch)

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.source.announce(self.indices(indices, epoch), epoch)


class Shuffle(Reordered):
    """Another order each epoch, drawn from a seed.

    `quality` is 1 where an order mixes as well as a full shuffle, which is what this one is.
    """

    steady = False
    quality = 1.0

    def __init__(self, source: Source, seed: int, note: str = "") -> None:
        super().__init__(source, len(source))
        self.seed, self.note = seed, note

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        return permuted(positions, len(self), self.seed, epoch)

    def facts(self) -> dict[str, str]:
        return {
            **super().facts(),
            "order": f"a bijection keyed by seed {self.seed} and epoch, computed, not stored",
            **({"within": self.note} if self.note else {}),
        }


class Shard(Reordered):
    """Every size-th element, from rank on."""

    def __init__(self, source: Source, rank: int, size: int) -> None:
        length = None if source.length is None else max(0, -(-(source.length - rank) // size))
        super().__init__(source, length)
        self.rank, self.size = rank, size

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        if self.length is None and int(positions.max()) > (BOUND - 1 - self.rank) // self.size:
            raise PositionError(f"element {positions.max()} of rank {self.rank} of {self.size} lies beyond position 2⁶³")
        return self.rank + self.size * positions

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "shard": f"rank {self.rank} of {self.size}"}


class Part(Reordered):
    """The elements from start to stop: of the source's own order, or of one fixed random order."""

    def __init__(self, source: Source, start: int, stop: int, seed: int | None) -> None:
        super().__init__(source, stop - start)
        self.start, self.seed = start, seed

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        positions = positions + self.start
        return positions if self.seed is None else permuted(positions, len(self.source), self.seed, None)

    def runs(self) -> Runs | None:
        whole = self.source.runs()
        return None if whole is None or self.seed is not None else whole.between(self.start, self.start + len(self))

    def facts(self) -> dict[str, str]:
        order = "contiguous" if self.seed is None else f"drawn with seed {self.seed}, the same in every epoch"
        return {**super().facts(), "part": f"{len(self):,} of {len(self.source):,} elements, {order}"}


def split(source: Source, fractions: tuple[float, ...], seed: int | None, groups: Any = None) -> Sequence[Reordered]:
    """The parts of `Source.split`, which see."""
    if not source.steady:
        raise ArgumentError(
            "the order of this source changes with the epoch, so elements would pass between the parts: "
            "split first, then shuffle the parts"
        )
    valid = all(isinstance(f, Real) and 0 < f <= 1 for f in fractions)
    if not fractions or not valid or math.fsum(fractions) > 1 + 1e-9:
        raise ArgumentError(f"split takes fractions above 0 that sum to at most 1, got {fractions}")
    # fsum: ten times 0.1 is 1, and leaves no rest.
    rest = 1 - math.fsum(fractions)
    shares = (*fractions, rest) if rest > 1e-9 else fractions
    if groups is not None:
        from functrain.data.groups import split_groups

        return split_groups(source, shares, seed, groups)
    length = len(source)
    bounds = [0, *(min(length, round(length * math.fsum(shares[: n + 1]))) for n in range(len(shares)))]
    pairs = list(itertools.pairwise(bounds))
    if any(start == stop for start, stop in pairs):
        sizes = ", ".join(str(stop - start) for start, stop in pairs)
        raise ArgumentError(f"split{fractions} of {length} elements leaves a part empty (sizes {sizes})")
    return tuple(Part(source, start, stop, seed) for start, stop in pairs)


class Repeat(Source):
    """Epoch after epoch of a source."""

    def __init__(self, source: Source, epochs: int | None) -> None:
        if not source.length:
            raise ArgumentError("a source without elements cannot be repeated")
        self.source, self.inner, self.epochs, self.period = source, (source,), epochs, source.length
        self.length = None if epochs is None else epochs * source.length

    def _first(self, epoch: int) -> int:
        # Epoch e of three epochs begins with epoch 3e; without end, it is the stream from epoch e on.
        return epoch * (self.epochs or 1)

    def get(self, i: int, epoch: int) -> Tree:
        return self.source.get(i % self.period, self._first(epoch) + i // self.period)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        parts = self._parts(indices, epoch)
        return joined(len(indices), ((f"epoch {number}", here, self.source.take(at, number)) for number, here, at in parts))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        for number, _, at in self._parts(indices, epoch):
            self.source.announce(at, number)

    def _parts(self, indices: np.ndarray, epoch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each epoch that has some of the elements: its number, their places in `indices`, and in the epoch."""
        passes, at = np.divmod(indices, self.period)
        if len(passes) == 1:
            yield self._first(epoch) + int(passes[0]), np.array([0]), at
            return
        for number in np.unique(passes).tolist():
            here = np.flatnonzero(passes == number)
            yield self._first(epoch) + number, here, at[here]

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "epochs": f"{self.epochs or 'without end'}, of {self.period:,}"}


class Epoch(Source):
    """A source as it is in one epoch."""

    steady = True

    def __init__(self, source: Source, epoch: int) -> None:
        self.source, self.inner, self.length, self.number = source, (source,), source.length, epoch

    def get(self, i: int, epoch: int) -> Tree:
        return self.source.get(i, self.number)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return self.source.take(indices, self.number)

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        return self.source.elements(indices, self.number)

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.source.announce(indices, self.number)

    def runs(self) -> Runs | None:
        return self.source.runs()

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "epoch": str(self.number)}
