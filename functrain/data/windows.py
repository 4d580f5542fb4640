"""A source of sequences out of a source of time steps: windows of neighbours."""

from __future__ import annotations

import numpy as np

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.runs import Runs
from functrain.data.source import Source


class Windows(Source):
    """Element i is the elements i·stride … i·stride + size − 1 of the source, stacked to `(size, …)`."""

    ragged = False

    def __init__(self, source: Source, size: int, stride: int) -> None:
        self.source, self.inner, self.size, self.stride = source, (source,), size, stride
        steps = source.finite("windows").length
        assert steps is not None
        if steps < size:
            raise ArgumentError(f"windows of {size} do not fit into a source of length {steps}")
        self.length = (steps - size) // stride + 1
        self.rest = steps - ((self.length - 1) * stride + size)

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Where in the inner source the windows at `indices` begin."""
        return indices * self.stride

    def before(self, steps: np.ndarray) -> np.ndarray:
        """How many windows begin before each of these steps of the inner source."""
        return np.minimum(-(-steps // self.stride), len(self))

    def runs(self) -> Runs | None:
        runs = self.source.runs()
        if runs is None:
            return None
        # Windows belong to the run in which they begin; of its steps each brings as many as lie between two windows.
        return Runs.of(np.diff(self.before(runs.ends()), prepend=0), runs.size * self.stride)

    def get(self, i: int, epoch: int) -> Tree:
        return self.source.take(self.starts(np.array([i])) + np.arange(self.size), epoch)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        shape = (len(indices), self.size)
        steps = self.source.take(self._steps(indices), epoch)
        return tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), steps)

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.source.announce(self._steps(indices), epoch)

    def _steps(self, indices: np.ndarray) -> np.ndarray:
        return (self.starts(indices)[:, None] + np.arange(self.size)).reshape(-1)

    def facts(self) -> dict[str, str]:
        windows = f"{self.length:,} of {self.size} time steps, one every {self.stride}"
        return {"windows": windows, "left over": f"{self.rest} time steps at the end"}
