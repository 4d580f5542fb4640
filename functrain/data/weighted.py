"""A source in an order drawn with replacement, each element as often as its weight says."""

from __future__ import annotations

from typing import Any

import numpy as np

from functrain.core import random
from functrain.core.errors import ArgumentError
from functrain.data.arguments import integer
from functrain.data.labels import without_torch
from functrain.data.order import Reordered
from functrain.data.permutation import hashed
from functrain.data.source import Source

_WEIGHTED = 0x71374491428A2F98


class Weighted(Reordered):
    """Draws with replacement: element i with probability weights[i] / Σ weights, whatever was drawn before.

    A draw takes a column c of n at random, and is c with probability `kept[c]`, else `alias[c]`: the alias method (Walker,
    "An efficient method for generating discrete random variables with general distributions", 1977; Vose, "A linear
    algorithm for generating random numbers with a given distribution", 1991). Both choices are hashes of seed, epoch and
    position. The table is made by sweeping over light and heavy elements at once (Hübschle-Schneider and Sanders, "Parallel
    weighted random sampling", 2019), in prefix sums; it takes 16 bytes an element.
    """

    steady = False

    def __init__(self, source: Source, weights: Any, seed: int, length: int | None) -> None:
        if not source.length:
            raise ArgumentError("a source without elements has none to draw")
        if not source.steady:
            raise ArgumentError(
                "the order of this source changes with the epoch, so weights cannot say which element stands where: weight "
                "first (a weighted order is random as it is: leave .shuffle out)"
            )
        super().__init__(source, source.length if length is None else integer("length", length, 1))
        self.seed = seed
        shares = _shares(weights, source.length)
        self.kept, self.alias = _table(shares)
        self.drawn_never = int((shares == 0).sum())
        self.effective = float(1 / np.square(shares / len(shares)).sum())
        self.key = random.fold_in(random.key(seed), _WEIGHTED).reshape(1).numpy().view(np.uint64)

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        # Two numbers for each position.
        keys = hashed(hashed(self.key ^ np.uint64(epoch)) ^ positions.astype(np.uint64))
        first, second = (_uniform(hashed(keys ^ np.uint64(number))) for number in (0, 1))
        columns = (first * len(self.kept)).astype(np.int64)
        return np.where(second < self.kept[columns], columns, self.alias[columns])

    def facts(self) -> dict[str, str]:
        count = len(self.kept)
        never = f", {self.drawn_never:,} have weight 0" if self.drawn_never else ""
        return {
            **super().facts(),
            "order": f"drawn with replacement, by seed {self.seed}, epoch and position",
            "weights": f"uneven as if {self.effective:,.1f} of {count:,} elements had all, (Σw)² / Σw²{never}",
            "table": f"16 B for each of {count:,} elements",
        }


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), multiples of 2⁻⁵³."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _shares(weights: Any, length: int) -> np.ndarray:
    """Weights in proportion, with a mean of 1."""
    try:
        values = np.asarray(without_torch(weights))
    except ValueError as error:
        raise ArgumentError(f"weights are numbers (n,), one for each element: {error}") from error
    if values.dtype.kind not in "biuf":
        raise ArgumentError(f"weights are numbers (n,), one for each element, got {type(weights).__name__} of {values.dtype}")
    if values.shape != (length,):
        raise ArgumentError(f"weights are one for each element: the source has {length:,}, got weights of shape {values.shape}")
    values = values.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if wrong.size:
        place = int(wrong[0])
        raise ArgumentError(f"weights are finite and at least 0: {wrong.size:,} are not, weight {place} is {values[place]}")
    if not values.any():
        raise ArgumentError("all weights are 0: there is nothing to draw")
    # First by the largest, for the sum must not overflow; summed in order, which has the same bits on every machine.
    values = values / values.max()
    return values * (length / np.cumsum(values)[-1])


def _table(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept, alias = np.ones(len(shares)), np.arange(len(shares))
    heavy = np.flatnonzero(shares > 1)
    light = np.flatnonzero(shares < 1)
    if not heavy.size or not light.size:
        return kept, alias
    # What light columns up to each lack, and heavy elements up to each have too much.
    lacking, excess = np.cumsum(1 - shares[light]), np.cumsum(shares[heavy] - 1)
    kept[light] = shares[light]
    # A light column is filled up by the heavy element whose excess is not used up yet when its turn comes.
    filler = np.searchsorted(excess, np.concatenate([[0.0], lacking[:-1]]), "left")
    alias[light] = heavy[np.minimum(filler, len(heavy) - 1)]
    # The light column that takes more than a heavy element can spare makes its own column one to be filled, by the next.
    taking = np.searchsorted(lacking, excess, "right")
    over = np.flatnonzero((taking < len(lacking)) & (np.arange(len(heavy)) < len(heavy) - 1))
    kept[heavy[over]] = np.clip(1 - (lacking[taking[over]] - excess[over]), 0, 1)
    alias[heavy[over]] = heavy[over + 1]
    return kept, alias
