"""The examples of a batch with what belongs to each of them, cut into parts and joined again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.reduce.base import Gradient, add
from functrain.core.tree import Tree


class Examples(NamedTuple):
    """A gradient to be taken at `params`, of each of `size` examples; their lanes of carry, their keys `(N,)`."""

    grad: Any
    params: Tree
    batch: Tree
    carry: Tree
    keys: Tensor | None
    size: int

    def parts(self, count: int) -> Iterator[Examples]:
        """Parts of at most `count` examples, in order."""
        if count >= self.size:
            yield self
            return
        flat, spec = tree.flatten((self.batch, self.carry, self.keys))
        for column in zip(*(leaf.split(count) for leaf in flat)):
            batch, carry, keys = tree.unflatten(spec, column)
            yield Examples(self.grad, self.params, batch, carry, keys, len(column[0]))


def added(parts: list[Gradient]) -> Gradient:
    """Sums over parts, as the sum over all examples; lanes of carry joined."""
    total: Gradient = tree.tree_reduce(add, parts)  # type: ignore[arg-type]
    return total._replace(carry=_lanes(parts))


def joined(parts: list[Gradient]) -> Gradient:
    """Rows `(n, …)` of parts, as rows of all examples."""
    return parts[0] if len(parts) == 1 else tree.map(lambda *leaves: torch.cat(leaves), *parts)


def _lanes(parts: list[Gradient]) -> Tree:
    return parts[0].carry if len(parts) == 1 else tree.map(lambda *leaves: torch.cat(leaves), *(part.carry for part in parts))
