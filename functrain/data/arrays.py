"""A source over arrays that are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import TreeError
from functrain.core.tree import Tree
from functrain.data.rows import readable, row, rows
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
            [
                _picked(leaf, indices) if isinstance(leaf, Tensor) else rows(leaf, indices)
                for leaf in self.leaves
            ],
        )

    def facts(self) -> dict[str, str]:
        held = {
            name or "elements": f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}, in memory"
            for name, leaf in zip(self.names, self.leaves)
        }
        return {**super().facts(), **held}


def _checked(leaf: Any, name: str) -> Tensor | np.ndarray:
    if isinstance(leaf, Tensor):
        plain = leaf.detach()
        # NumPy picks rows of a CPU tensor three times as fast, without a thread pool; it does not know bfloat16.
        known = plain.device.type == "cpu" and plain.layout == torch.strided and plain.dtype in _NUMPY
        return plain.resolve_conj().resolve_neg().numpy() if known else plain
    if isinstance(leaf, np.ndarray) and readable(leaf.dtype):
        return np.asarray(leaf)
    kind = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
    raise TreeError(
        f"leaf {name!r} is {kind}: arrays takes tensors, and NumPy arrays of bool, int, float or complex"
    )


def _picked(leaf: Tensor, indices: np.ndarray) -> Tensor:
    return leaf.index_select(0, torch.from_numpy(indices).to(leaf.device))


_NUMPY = frozenset(
    (
        *(
            torch.bool,
            torch.uint8,
            torch.uint16,
            torch.uint32,
            torch.uint64,
            torch.int8,
            torch.int16,
            torch.int32,
        ),
        *(torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
)
