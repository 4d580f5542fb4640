"""A source in class-balanced order: as many elements of each class, however many there are."""

from __future__ import annotations

from typing import Any

import numpy as np

from functrain.core import random
from functrain.core.errors import ArgumentError
from functrain.data.arguments import before, integer
from functrain.data.labels import classes
from functrain.data.order import Reordered
from functrain.data.permutation import permuted_each
from functrain.data.remembered import remembered
from functrain.data.source import Source

_BLOCK_BITS = 12


class Balanced(Reordered):
    """Class after class: element i belongs to class c = i mod C, and each class goes through shuffled passes of its own.

    Epoch e of length L holds D = ⌈(L − c)/C⌉ draws of class c. Element i is draw k = e·D + ⌊i/C⌋ of its class in all: what
    stands at place k mod n of pass ⌊k/n⌋ through the n elements of the class, in an order that is a bijection keyed by
    seed, class and pass. So all elements of a class come equally often, ±1, at any time.

    Source: class-aware sampling, Shen, Lin and Huang, "Relay backpropagation for effective learning of deep
    convolutional neural networks", ECCV 2016.
    """

    steady = False

    def __init__(self, source: Source, labels: Any, seed: int, length: int | None) -> None:
        if not source.length:
            raise ArgumentError("a source without elements has no classes to balance")
        if not source.steady:
            raise ArgumentError(
                "the order of this source changes with the epoch, so labels cannot say which class stands where: balance "
                "first (a balanced order is shuffled as it is: leave .shuffle out), and augment after that"
            )
        self.names, numbers = classes(labels, source.length)
        count = len(self.names)
        if length is None:
            length = count * -(-source.length // count)
        elif integer("length", length, 1) < count:
            raise ArgumentError(f"length must be at least {count}, the number of classes, got {length}")
        super().__init__(source, length)
        self.seed = seed
        self.members = np.argsort(numbers, kind="stable")
        self.sizes = np.bincount(numbers)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.draws = -(-(length - np.arange(count)) // count)
        # A seed for each class: classes of one size would otherwise go through their elements in step.
        self.seeds = random.split(random.key(seed), count).numpy()
        # Neighbouring positions come from a block that is computed once: a batch of 128 takes 0.1 ms on average,
        # and 0.8 computed by itself, nearly all of it NumPy's overhead.
        self._block = remembered(self._computed, 4)

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        blocks = positions >> _BLOCK_BITS
        numbers = np.unique(blocks)
        if len(numbers) > 2:
            return self._drawn(positions, epoch)
        result = np.empty_like(positions)
        for number in numbers.tolist():
            here = blocks == number
            result[here] = self._block(number, epoch)[positions[here] - (number << _BLOCK_BITS)]
        return result

    def _computed(self, number: int, epoch: int) -> np.ndarray:
        start = number << _BLOCK_BITS
        return self._drawn(np.arange(start, min(start + (1 << _BLOCK_BITS), len(self))), epoch)

    def _drawn(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        before(epoch, len(self))
        rounds, classes = np.divmod(positions, len(self.names))
        sizes = self.sizes[classes]
        passes, places = np.divmod(epoch * self.draws[classes] + rounds, sizes)
        return self.members[self.starts[classes] + permuted_each(places, sizes, self.seeds[classes], passes)]

    def facts(self) -> dict[str, str]:
        held = [f"{name}: {size:,}" for name, size in zip(self.names.tolist(), self.sizes.tolist())]
        listed = ", ".join(held if len(held) <= 6 else [*held[:3], "…", *held[-2:]])
        order = f"one class after the other, each shuffled with seed {self.seed}, pass after pass"
        return {**super().facts(), "order": order, "classes": f"{len(held):,} ({listed})"}
