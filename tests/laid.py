"""Sources of numbers for tests of order: element i is i, in runs as one says, and what is announced is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from functrain.data import Source
from functrain.data.runs import Runs


class Laid(Source):
    """0, 1, 2 … in stretches `(length, step)`; `announced` holds `(indices, epoch)` of each call."""

    def __init__(self, *stretches: tuple[int, int], size: int = 8) -> None:
        self.layout = Runs(stretches, size)
        self.length = self.layout.length
        self.announced: list[tuple[list[int], int]] = []

    def get(self, i: int, epoch: int) -> Any:
        return torch.tensor(i)

    def take(self, indices: np.ndarray, epoch: int) -> Any:
        return torch.from_numpy(indices.copy())

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.announced.append((indices.tolist(), epoch))

    def runs(self) -> Runs | None:
        return self.layout if any(step > 1 for _, step in self.layout.stretches) else None

    def run_of(self) -> np.ndarray:
        """The number of the run that each element is in, by counting."""
        numbers: list[int] = []
        for length, step in self.layout.stretches:
            first = numbers[-1] + 1 if numbers else 0
            numbers += [first + place // step for place in range(length)]
        return np.array(numbers)


def numbers(length: int) -> Laid:
    """0 … length−1, each alone."""
    return Laid((length, 1))


def order_of(source: Source, epoch: int = 0) -> np.ndarray:
    """All elements of a source of numbers, in order, from one `take`."""
    return source.take(np.arange(len(source)), epoch).numpy()
