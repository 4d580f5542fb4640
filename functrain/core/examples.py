"""Gradients of single examples: taken together, used one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.errors import LossError
from functrain.core.grad import checked_size, summed
from functrain.core.reduce.base import Gradient
from functrain.core.tree import Tree

Scale = Callable[[Tensor], Tensor]


def example_grads(
    grad: Any, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None, budget: int | None = None
) -> Gradient:
    """The gradient of each example by itself: grads, loss, weight and aux with leaves `(N, …)`."""
    check_lanes(grad)
    size = checked_size(batch)
    keys = random.example_keys(key, size) if key is not None and "key" in grad.uses else None
    flat, spec = tree.flatten((batch, keys, carry))
    result = None

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal result
        part, own, lane = tree.unflatten(spec, [leaf.unsqueeze(0) for leaf in leaves])
        outputs, result = tree.flatten(summed(grad, params, part, carry=lane, key=own))
        return tuple(outputs)

    outputs = torch.func.vmap(one)(*flat)
    assert result is not None
    taken: Gradient = tree.unflatten(result, outputs)
    return taken._replace(carry=tree.map(lambda leaf: leaf.flatten(0, 1), taken.carry))


def scaled_sum(
    grad: Any,
    params: Tree,
    batch: Tree,
    *,
    scale: Scale,
    carry: Tree = None,
    key: Tensor | None = None,
    budget: int | None = None,
) -> Gradient:
    """Σᵢ s(‖gᵢ‖) gᵢ over the examples of a batch, with Σ loss, Σ weight and Σ aux beside it.

    `scale(norms (N,)) -> (N,)`; the norms are those of each example's gradient over all leaves together.
    """
    taken = example_grads(grad, params, batch, carry=carry, key=key, budget=budget)
    norms = torch.stack([leaf.flatten(1).square().sum(1) for leaf in tree.leaves(taken.grads)]).sum(0).sqrt()
    scales = scale(norms)
    grads = tree.map(lambda leaf: torch.tensordot(scales.to(leaf.dtype), leaf, 1), taken.grads)
    loss, weight, aux = tree.map(lambda leaf: leaf.sum(0), (taken.loss, taken.weight, taken.aux))
    return Gradient(grads, loss, weight, taken.carry, aux)


def check_lanes(grad: Any) -> None:
    """Raise `LossError` where the gradient of one example is not defined: the loss threads buffers that all examples share."""
    if "carry" in grad.uses and not grad.lanes:
        raise LossError(
            "the loss threads buffers that all examples of a batch share (batch norm), so no example has a gradient of its "
            "own: use a norm of single examples (nn.GroupNorm, nn.LayerNorm), or say ft.grad(loss, lanes=True) where the "
            "carry has a lane for each example"
        )


