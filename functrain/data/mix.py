"""Sources mixed in fixed proportions, each read in its own order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np

from functrain.core import random
from functrain.core.errors import ArgumentError
from functrain.data.arguments import before, integer
from functrain.data.gathered import Gathered
from functrain.data.permutation import hashed, permuted
from functrain.data.remembered import remembered
from functrain.data.source import Source

_MIX = 0x59F111F1B605D019
_BLOCK_BITS = 10


def mix(
    sources: Sequence[Source] | Mapping[str, Source],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    seed: int = 0,
    length: int | None = None,
) -> Mix:
    """Elements of several sources, in proportion to `weights`; each source is read in its own order, epoch after epoch.

    Which source a position takes from is arithmetic on seed and position, and its c-th turn takes the c-th element of
    `source.repeat()`: within an epoch of its own, a source loses and repeats nothing, however often the mix ends one.
    After any number of positions a source has had its share, up to one block of 1024.

    - `sources`: a list, or a dict whose names `explain` uses. A source without end is read on and on.
    - `weights`: one for each, at least 0, in any unit; default the lengths: then an epoch of the mix holds every element
      of every source exactly once.
    - `length`: of an epoch; default the sum of the lengths, and without end where a source has none.

    Elements that differ in structure can be had one by one, and made alike with `.map(fn)` before `.batch`. Raises
    `ArgumentError` for no sources, empty ones, weights that do not fit, and none where a source has no end; `TreeError`
    where elements of one batch disagree.

    >>> import functrain as ft, torch
    >>> both = ft.mix({"a": ft.arrays(torch.zeros(300)), "b": ft.arrays(torch.ones(10))}, weights={"a": 3, "b": 1}, seed=0)
    >>> both.length, int(sum(both.epoch(k)(i) for k in range(4) for i in range(310)))
    (310, 310)
    """
    named = _named(sources)
    return Mix(named, _weights(named, weights), integer("seed", seed), None if length is None else integer("length", length, 1))


def _named(sources: Any) -> dict[str, Source]:
    if isinstance(sources, Mapping):
        named = {str(name): source for name, source in sources.items()}
    elif isinstance(sources, Sequence) and not isinstance(sources, str):
        named = {f"source {number}": source for number, source in enumerate(sources)}
    else:
        raise ArgumentError(f"mix takes a list or a dict of sources, got {type(sources).__name__}")
    if not named:
        raise ArgumentError("mix takes at least one source")
    for name, source in named.items():
        if not isinstance(source, Source):
            raise ArgumentError(f"mix takes sources, got {type(source).__name__} as {name!r}: see functrain.arrays")
        if source.length == 0:
            raise ArgumentError(f"{name!r} has no elements to mix in")
    if len({source.deferring for source in named.values()}) > 1:
        raise ArgumentError("some of these sources give deferred batches, and some do not: deferred() all of them, or none")
    return named


def _weights(named: dict[str, Source], weights: Any) -> list[int]:
    """The weights as whole numbers: a float is a fraction, so that shares stay exact however far a run goes."""
    if weights is None:
        endless = [name for name, source in named.items() if source.length is None]
        if endless:
            raise ArgumentError(f"{endless[0]!r} has no end, so proportions cannot follow lengths: give weights")
        weights = [len(source) for source in named.values()]
    if isinstance(weights, Mapping):
        if set(weights) != set(named):
            raise ArgumentError(f"weights are one for each source: sources {list(named)}, got weights {list(weights)}")
        weights = [weights[name] for name in named]
    listed = weights.tolist() if hasattr(weights, "tolist") else list(weights) if isinstance(weights, Sequence) else weights
    if not isinstance(listed, list) or len(listed) != len(named):
        raise ArgumentError(f"weights are one for each of {len(named)} sources, got {weights!r}")
    for name, weight in zip(named, listed):
        # An int may be larger than any float.
        finite = isinstance(weight, Integral) or (isinstance(weight, Real) and math.isfinite(weight))
        if isinstance(weight, bool) or not finite or weight < 0:
            raise ArgumentError(f"weights are finite numbers of at least 0, got {weight!r} for {name!r}")
    if not any(listed):
        raise ArgumentError("all weights are 0: there is nothing to mix")
    exact = [Fraction(int(weight) if isinstance(weight, Integral) else float(weight)) for weight in listed]
    unit = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * unit) for weight in exact]


class Mix(Gathered):
    """Sources in proportion, in blocks of positions within which a keyed bijection says whose turn it is.

    Among the first G positions of all epochs together, where a block ends, source k has had C_k(G) turns: sources in
    descending order of weight each get m·w_k / (w_k + … of those that follow), rounded, of the m positions that are left.
    All C_k grow with G, their sum is G, and of K sources C_k(G) differs from G·w_k / Σw by at most 1 + ln(K) / 2. A block of
    an epoch holds the difference between its two ends; the turns that a source has in it are in order.
    """

    def __init__(self, named: dict[str, Source], weights: list[int], seed: int, length: int | None) -> None:
        self.names, self.inner, self.seed = list(named), tuple(named.values()), seed
        lengths = [source.length for source in self.inner]
        self.length = length if length is not None or None in lengths else sum(n for n in lengths if n is not None)
        # Turns count through all epochs.
        self.streams = [(source if source.length is None else source.repeat()).epoch(0) for source in self.inner]
        self.weights = weights
        self.falling = sorted((k for k, weight in enumerate(weights) if weight), key=lambda k: -weights[k])
        self._key = random.fold_in(random.key(seed), _MIX).reshape(1).numpy().view(np.uint64)
        self._block = remembered(self._laid, 8)

    @property
    def steady(self) -> bool:
        return self.length is None

    def found(self, indices: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = indices >> _BLOCK_BITS
        numbers, turns = np.empty_like(indices), np.empty_like(indices)
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            of_place, turn_at = self._block(block, 0 if self.length is None else epoch)
            places = indices[here] - (block << _BLOCK_BITS)
            numbers[here], turns[here] = of_place[places], turn_at[places]
        return numbers, turns

    def turns(self, positions: int) -> list[int]:
        """How many turns each source has had after so many positions, at the end of a block."""
        had, left, total = [0] * len(self.weights), positions, sum(self.weights)
        for k in self.falling:
            # Half up, in whole numbers of any size.
            had[k] = (2 * left * self.weights[k] + total) // (2 * total)
            left, total = left - had[k], total - self.weights[k]
        return had

    def _laid(self, block: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The source at each position of a block, and which turn it is."""
        start, stop = block << _BLOCK_BITS, (block + 1) << _BLOCK_BITS
        passed = 0 if self.length is None else before(epoch, self.length)
        size = (stop if self.length is None else min(stop, self.length)) - start
        first, after = self.turns(passed + start), self.turns(passed + start + size)
        quotas = np.array([b - a for a, b in zip(first, after)])
        key = int(hashed(self._key ^ np.uint64(block))[0])
        # The bijection says of each position which ticket it has, and tickets are laid out source after source.
        numbers = np.repeat(np.arange(len(quotas)), quotas)[permuted(np.arange(size), size, key, epoch)]
        order = np.argsort(numbers, kind="stable")
        turns = np.empty(size, dtype=np.int64)
        turns[order] = np.arange(size) + np.repeat(np.array(first) - (np.cumsum(quotas) - quotas), quotas)
        return numbers, turns

    def name(self, number: int) -> str:
        return self.names[number]

    def facts(self) -> dict[str, str]:
        total = sum(self.weights)
        shares = {name: weight / total for name, weight in zip(self.names, self.weights)}
        of_epoch = {
            name: f", {share * self.length / source.length:.3g} of its epochs in one"
            for (name, share), source in zip(shares.items(), self.inner)
            if self.length and source.length
        }
        return {
            **super().facts(),
            "order": f"by seed {self.seed} and position, shares exact over blocks of {1 << _BLOCK_BITS:,}",
            **{name: f"{share:.2%}{of_epoch.get(name, '')}" for name, share in shares.items()},
        }
