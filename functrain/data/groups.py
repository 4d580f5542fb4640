"""Splits that keep groups together: all elements of a patient, a file or an episode go to one part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.data.labels import classes
from functrain.data.order import Reordered
from functrain.data.permutation import permuted
from functrain.data.runs import Runs
from functrain.data.source import Source


class GroupPart(Reordered):
    """The elements of some groups, in the source's own order; `members` `(n,)` int64 says which, at 8 bytes each."""

    def __init__(self, source: Source, members: np.ndarray, groups: int, seed: int | None) -> None:
        super().__init__(source, len(members))
        self.members, self.count, self.seed = members, groups, seed

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        return self.members[positions]

    def runs(self) -> Runs | None:
        whole = self.source.runs()
        if whole is None:
            return None
        of = np.searchsorted(whole.ends(), self.members, "right")
        lengths = np.diff(np.flatnonzero(np.diff(of, prepend=-1, append=-1)))
        # Neighbouring runs of one length are one stretch.
        first = np.flatnonzero(np.diff(lengths, prepend=-1))
        times = np.diff(first, append=len(lengths))
        return Runs(tuple((int(n * k), int(n)) for n, k in zip(lengths[first], times)), whole.size)

    def facts(self) -> dict[str, str]:
        order = "in order of appearance" if self.seed is None else f"drawn with seed {self.seed}, the same in every epoch"
        part = f"{len(self):,} of {len(self.source):,} elements, in {self.count:,} groups, {order}"
        return {**super().facts(), "part": part}


def split_groups(source: Source, shares: Sequence[float], seed: int | None, labels: Any) -> tuple[GroupPart, ...]:
    """The parts of `Source.split` with `groups=labels`: groups in an order that `seed` draws, cut where shares end.

    Then groups change places, one for another or for none, as long as that brings two parts nearer to their shares.
    """
    names, numbers = classes(labels, len(source))
    count = len(names)
    if count < len(shares):
        raise ArgumentError(f"{count} groups cannot be split into {len(shares)} parts, for a group is not divided")
    appearance = np.argsort(np.unique(numbers, return_index=True)[1])
    order = appearance if seed is None else permuted(np.arange(count), count, seed, None)
    sizes = np.bincount(numbers)[order]
    homes = np.empty(count, dtype=np.int64)
    homes[order] = _homes(sizes, np.array(shares) * len(source))
    of_element = homes[numbers]
    return tuple(
        GroupPart(source, np.flatnonzero(of_element == part), int((homes == part).sum()), seed) for part in range(len(shares))
    )


def _homes(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The part for each group, none empty: sums of `sizes` are to be near `targets`."""
    parts, ends = len(targets), np.cumsum(sizes)
    cuts = [0]
    for place, bound in enumerate(np.cumsum(targets)[:-1], start=1):
        nearest = int(np.argmin(np.abs(ends - bound))) + 1
        cuts.append(min(max(nearest, cuts[-1] + 1), len(sizes) - parts + place))
    homes = np.repeat(np.arange(parts), np.diff([*cuts, len(sizes)]))
    for _ in range(len(sizes)):
        off = np.bincount(homes, sizes, parts) - targets
        pairs = [pair for pair in itertools.permutations(range(parts), 2) if off[pair[0]] > off[pair[1]]]
        changes = [(*_exchange(sizes, homes, one, other, off[one] - off[other]), one, other) for one, other in pairs]
        gain, leaving, coming, one, other = max(changes, key=lambda change: change[0], default=(0.0, 0, 0, 0, 0))
        if gain < 1e-6:
            break
        homes[leaving] = other
        if coming >= 0:
            homes[coming] = one
    return homes


def _exchange(sizes: np.ndarray, homes: np.ndarray, one: int, other: int, excess: float) -> tuple[float, int, int]:
    """By how much Σ (size − target)² falls when a group of part `one` leaves and one of the `other`, or none, comes; which."""
    mine, theirs = np.flatnonzero(homes == one), np.flatnonzero(homes == other)
    mine = mine[np.argsort(sizes[mine], kind="stable")]
    # None comes only where another group stays.
    offers = np.concatenate([[-1] if len(mine) > 1 else [], theirs]).astype(np.int64)
    back = np.where(offers < 0, 0, sizes[offers])
    near = np.searchsorted(sizes[mine], back + excess / 2)
    places = np.clip(np.stack([near - 1, near]), 0, len(mine) - 1)
    moved = sizes[mine[places]] - back
    gains = 2 * moved * (excess - moved)
    side, offer = np.unravel_index(np.argmax(gains), gains.shape)
    return float(gains[side, offer]), int(mine[places[side, offer]]), int(offers[offer])
