"""A source of sequences out of a source of time steps: windows of neighbours."""

from __future__ import annotations

import numpy as np

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.source import Source


class Windows(Source):
    """Element i is the elements i·stride … i·stride + size − 1 of the source, stacked to `(size, …)`."""

    def __init__(self, source: Source, size: int, stride: int) -> None:
        self.source, self.inner, self.size, self.stride = source, (source,), size, stride
        steps = source.finite("windows").length
        assert steps is not None
        if steps < size:
            raise ArgumentError(f"windows of {size} do not fit into a source of length {steps}")
        self.length = (steps - size) // stride + 1
        self.rest = steps - ((self.length - 1) * stride + size)

    def get(self, i: int, epoch: int) -> Tree:
        return self.source.take(np.arange(i * self.stride, i * self.stride + self.size), epoch)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        places = (indices[:, None] * self.stride + np.arange(self.size)).reshape(-1)
        shape = (len(indices), self.size)
        return tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), self.source.take(places, epoch))

    def facts(self) -> dict[str, str]:
        windows = f"{self.length:,} of {self.size} time steps, one every {self.stride}"
        return {"windows": windows, "left over": f"{self.rest} time steps at the end"}
