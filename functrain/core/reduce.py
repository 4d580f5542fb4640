"""Reducers: how the sums that parts of a batch give become one gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import LossError
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree


class Gradient(NamedTuple):
    """A gradient and what came with it.

    Unfinished, as gradients give it and reducers merge it: sums over examples. Finished: what the optimizer gets.

    - `grads`: like params: Σ wᵢ ∇lossᵢ;
    - `loss`: 0-d: Σ wᵢ lossᵢ;
    - `weight`: 0-d, float64: Σ wᵢ (the number of losses when there are no weights); kept when finished;
    - `carry`: for the next call, or None;
    - `aux`: a tree of 0-d tensors: Σ wᵢ auxᵢ.
    """

    grads: Tree
    loss: Tensor
    weight: Tensor
    carry: Tree = None
    aux: Tree = None


@dataclass(frozen=True)
class Reducer:
    """A monoid over unfinished gradients: `lift` each part's, `merge` two (associatively), `finish` once.

    `linear` says that merging adds, so that parts may as well be summed before the gradient is taken.
    The carry is not the reducer's business: `merge` drops it, and `parallel` threads it.

    A reducer of one's own takes a few lines, here the part with the largest loss:

    >>> def larger(a, b):
    ...     return tree.map(lambda x, y: torch.where(a.loss >= b.loss, x, y), a, b)
    >>> worst = Reducer("worst", merge=larger, finish=mean.finish)
    """

    name: str
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Gradient]
    lift: Callable[[Gradient], Any] = lambda gradient: gradient
    linear: bool = False

    def __repr__(self) -> str:
        return f"reduce.{self.name}"


def add(left: Tree | None, right: Tree | None) -> Tree | None:
    """The sum of two trees of tensors; `None` is nothing: None + g = g. Neither is changed.

    >>> add(None, {"w": torch.ones(1)})
    {'w': tensor([1.])}
    """
    if left is None or right is None:
        return right if left is None else left
    if isinstance(left, Tensor):
        return left + right
    if isinstance(left, Gradient) and isinstance(right, Gradient):
        grads, loss, weight, _, aux = (add(a, b) for a, b in zip(left, right._replace(carry=None)))
        return Gradient(grads, loss, weight, None, aux)  # type: ignore[arg-type]
    return tree.map(torch.add, left, right)


def checked_weight(weight: Tensor) -> None:
    """Raise `LossError` where the mean over nothing is asked for, as far as that can be seen without waiting for a device."""
    if weight.is_cpu and not inside_transform() and not inside_tracing() and not weight.item():
        raise LossError("the weights of this batch sum to zero: there is nothing to take the mean of; leave such batches out")


def _mean(total: Gradient) -> Gradient:
    checked_weight(total.weight)
    grads, loss, aux = tree.map(lambda leaf: leaf / total.weight.to(leaf.dtype), (total.grads, total.loss, total.aux))
    return total._replace(grads=grads, loss=loss, aux=aux)


mean = Reducer("mean", merge=add, finish=_mean, linear=True)
"""The weighted mean Σ wᵢ gᵢ / Σ wᵢ over all examples, whatever the sizes of the parts: divided once, at the end."""

sum = Reducer("sum", merge=add, finish=lambda total: total, linear=True)
"""The sum Σ wᵢ gᵢ over all examples; loss and aux are sums too."""
