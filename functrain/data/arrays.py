"""A source over arrays that are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import TreeError
from functrain.core.tree import Tree
from functrain.data.rows import readable, row, rows, whole_run
from functrain.data.source import Source


def arrays(data: Tree) -> Source:
    """A source over a tree of tensors or NumPy arrays `(N, …)`: element i is the tree of their rows i.

    The arrays are shared, not copied, so leave them as they are; elements are copies. Tensors stay on their
    device, and give no gradients. Raises `TreeError` where leaves disagree on N, or are neither tensors nor
    arrays of a dtype that torch has, or hold no elements.

    >>> source = arrays({"x": np.arange(6.0).reshape(3, 2), "y": torch.tensor([0, 1, 0])})
    >>> len(source), source(1)
    (3, {'x': tensor([2., 3.], dtype=torch.float64), 'y': tensor(1)})
    """
    return Arrays(data)


class Arrays(Source):
    """Rows of arrays in memory."""

    def __init__(self, data: Tree) -> None:
        self.names = tree.paths(data)
        leaves, self.structure = tree.flatten(data)
        self.leaves = [_checked(leaf, name) for leaf, name in zip(leaves, self.names)]
        self.length = tree.batch_size(data)
        if not self.length:
            raise TreeError("the arrays hold no elements (N = 0)")

    def get(self, i: int, epoch: int) -> Tree:
        return tree.unflatten(
            self.structure,
            [leaf[i].clone() if isinstance(leaf, Tensor) else row(leaf, i) for leaf in self.leaves],
        )

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return tree.unflatten(
            self.structure,
            [_picked(leaf, indices) if isinstance(leaf, Tensor) else rows(leaf, indices) for leaf in self.leaves],
        )

    def facts(self) -> dict[str, str]:
        held = {
            name or "elements": f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}, in memory"
            for name, leaf in zip(self.names, self.leaves)
        }
        return {**super().facts(), **held}


def _checked(leaf: Any, name: str) -> Tensor | np.ndarray:
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        return leaf.detach().resolve_conj().resolve_neg()
    if isinstance(leaf, np.ndarray) and readable(leaf.dtype):
        return np.asarray(leaf)
    kind = getattr(leaf, "layout" if isinstance(leaf, Tensor) else "dtype", None)
    what = type(leaf).__name__ if kind is None else f"{type(leaf).__name__} of {kind}"
    raise TreeError(f"leaf {name!r} is {what}: arrays takes dense tensors, and NumPy arrays of bool, int, float or complex")


def _picked(leaf: Tensor, indices: np.ndarray) -> Tensor:
    run = whole_run(indices)
    if run is not None:
        return leaf[run].clone()
    return leaf.index_select(0, torch.from_numpy(indices).to(leaf.device))
