"""Batches that each element is in by chance: what the accounting of differential privacy assumes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from functrain.core import random
from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.arguments import before
from functrain.data.remembered import remembered
from functrain.data.source import Source

# A block's hashes stay in the cache, and below torch's bound for a second thread; 12 ns an element.
_BLOCK = 1 << 15
# What is drawn here is apart from what a step draws of the same seed and position.
_POISSON = 0x1F83D9ABFB41BD6B


class Poisson(Source):
    """Poisson-subsampled batches: element e is in batch b with probability `rate`, whatever else is in it.

    The draw is the hash of (seed, b, e), with b = epoch · length + i, compared with a threshold: exact to 2⁻⁶⁴.

    Source: Abadi et al., "Deep learning with differential privacy", CCS 2016; Balle, Barthe, Gaboardi, "Privacy
    amplification by subsampling", NeurIPS 2018.
    """

    steady = False
    # As many rows as were drawn, padded.
    ragged = True

    def __init__(self, source: Source, rate: Any, seed: int, pad: int) -> None:
        rate = rate.item() if isinstance(rate, np.number) else rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ArgumentError(f"rate must be in (0, 1], got {rate!r}: the probability with which an element is in a batch")
        if not source.length:
            raise ArgumentError("a source without elements has none to draw")
        self.source, self.inner, self.rate, self.seed, self.pad = source, (source,), float(rate), seed, pad
        self.length = max(1, round(1 / rate))
        self.key = random.fold_in(random.key(seed), _POISSON)
        # A batch that is announced is taken soon.
        self._members = remembered(self._drawn, 4)

    def members(self, i: int, epoch: int) -> np.ndarray:
        """The indices (int64, ascending) of the elements that are in batch i of an epoch; there may be none."""
        return np.arange(len(self.source)) if self.rate == 1.0 else self._members(i, epoch)

    def _drawn(self, i: int, epoch: int) -> np.ndarray:
        count = len(self.source)
        key = random.fold_in(self.key, before(epoch, len(self)) + i)
        # Hashes are uniform over the int64s.
        threshold = math.ceil(self.rate * 2.0**64) - (1 << 63)
        found = []
        for start in range(0, count, _BLOCK):
            hashes = random.fold_in(key, torch.arange(start, min(start + _BLOCK, count)))
            found.append(np.flatnonzero((hashes < threshold).numpy()) + start)
        members = np.concatenate(found)
        members.setflags(write=False)
        return members

    def get(self, i: int, epoch: int) -> Tree:
        indices = self.members(i, epoch)
        size = self.pad * max(1, -(-len(indices) // self.pad))
        # A row that is there anyhow: one that was not drawn could bring a NaN along, which no weight takes out.
        other = indices[-1] if len(indices) else 0
        rows = self.source.take(np.pad(indices, (0, size - len(indices)), constant_values=other), epoch)
        weights = torch.zeros(size)
        weights[: len(indices)] = 1.0
        return rows, weights

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        for i in indices.tolist():
            members = self.members(i, epoch)
            if members.size:
                self.source.announce(members, epoch)

    def facts(self) -> dict[str, str]:
        expected = self.rate * len(self.source)
        spread = math.sqrt(expected * (1 - self.rate))
        return {
            **super().facts(),
            "batches": f"{expected:g} ± {spread:.2g} of {len(self.source):,} elements, each with probability {self.rate:g}",
            "padded": f"to multiples of {self.pad}, with rows of weight 0",
            "drawn": f"by seed {self.seed}, epoch and position",
        }
