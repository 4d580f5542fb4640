"""Reducers that have to see every part: merging gathers, and finishing combines the parts' mean gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import LossError
from functrain.core.reduce.base import Gradient, Reducer, add, divided, mean_of, visible
from functrain.core.tree import Tree

Rows = tuple[Gradient, ...]
Combine = Callable[[Tree, Tensor], Tree]


def lift(gradient: Gradient) -> Rows:
    """One part, as a row of one."""
    return (gradient,)


def merge(left: Rows, right: Rows) -> Rows:
    """The parts of both, in order: the free monoid, so nothing is computed before all parts are there."""
    return left + right


def gathered(name: str, combine: Combine, *, keyed: bool = False) -> Reducer:
    """A reducer out of `combine(rows, weights) -> grads`.

    - `rows`: like params, each leaf `(K, …)`: the mean gradient of each of K parts, in order;
    - `weights`: `(K,)` float64: the weight of each part;
    - returns grads like params, without the K.

    Keyed: `combine(rows, weights, key)`. Loss and aux are the weighted means over all examples, as always. A part whose
    weights sum to zero has no mean gradient: `LossError`, where that can be seen.
    """

    def finish(parts: Rows, *key: Tensor) -> Gradient:
        weights = torch.stack([part.weight for part in parts])
        check_parts(weights)
        rows = tree.stack([divided(part.grads, part.weight) for part in parts])
        total: Gradient = tree.tree_reduce(add, [part._replace(grads=(), carry=None) for part in parts])  # type: ignore[arg-type]
        return mean_of(total)._replace(grads=combine(rows, weights, *key))

    return Reducer(name, merge, finish, lift, keyed=keyed, gathers=True)


def check_parts(weights: Tensor) -> None:
    """Raise `LossError` naming the parts whose weights `(K,)` sum to zero."""
    if visible(weights) and not bool(weights.all()):
        empty = [place + 1 for place, weight in enumerate(weights.tolist()) if not weight]
        raise LossError(
            f"the weights of part {', '.join(map(str, empty))} of {len(weights)} sum to zero: it has no mean gradient that a "
            "reducer could compare with the others'; take fewer parts, or leave such examples out"
        )


def squared_distances(rows: Tree) -> Tensor:
    """‖gⱼ − gₖ‖² between all parts: `(K, K)`, float64, summed over leaves; not finite where a gradient is not."""
    total = None
    for leaf in tree.leaves(rows):
        flat = leaf.reshape(len(leaf), -1).double()
        # Differences, not the Gram matrix: near each other, parts' distances would drown in rounding.
        distances = torch.stack([(flat - row).square().sum(1) for row in flat])
        total = distances if total is None else total + distances
    assert total is not None
    return total


def select(rows: Tree, shares: Tensor) -> Tree:
    """Σₖ shareₖ gₖ over the parts whose share `(K,)` is not zero: what another part holds (NaN) is not touched."""

    def one(leaf: Tensor) -> Tensor:
        column = shares.to(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1))
        return torch.where(column != 0, leaf * column, torch.zeros_like(leaf)).sum(0)

    return tree.map(one, rows)
