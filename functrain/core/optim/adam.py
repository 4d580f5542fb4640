"""Adam, and AdamW, which decays weights apart from the gradient.

    g ← g + weight_decay · p                        (adam)       p ← p − lr · weight_decay · p   (adamw)
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

Sources: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015; Loshchilov and Hutter, "Decoupled
weight decay regularization", ICLR 2019; in the form of torch.optim's Adam and AdamW.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.optim.base import Hyper, Optimizer, checked, checked_grads, checked_state, place, resolve
from functrain.core.tree import Tree


class AdamState(NamedTuple):
    """The number of updates taken t, the first and second moments m and v, the hyperparameters."""

    steps: Tensor
    first: Tree
    second: Tree
    hyper: dict[str, Any]


def adam(lr: Hyper = 1e-3, *, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, weight_decay: Hyper = 0.0) -> Optimizer:
    """Adam, with weight decay as part of the gradient: numbers as in torch.optim.Adam.

    Every argument is a number or a schedule. Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.1000])}
    """
    return _adam("adam", False, lr, b1, b2, eps, weight_decay)


def adamw(lr: Hyper = 1e-3, *, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, weight_decay: Hyper = 1e-2) -> Optimizer:
    """AdamW, with weight decay apart from the gradient: numbers as in torch.optim.AdamW.

    Every argument is a number or a schedule. Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = adamw(0.1, weight_decay=0.5)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.1500])}
    """
    return _adam("adamw", True, lr, b1, b2, eps, weight_decay)


def _adam(name: str, decoupled: bool, lr: Hyper, b1: Hyper, b2: Hyper, eps: Hyper, weight_decay: Hyper) -> Optimizer:
    settings = {
        "lr": checked("lr", lr),
        "b1": checked("b1", b1, 0.0, 1.0),
        "b2": checked("b2", b2, 0.0, 1.0),
        "eps": checked("eps", eps),
        "weight_decay": checked("weight_decay", weight_decay),
    }

    def init(params: Tree) -> AdamState:
        count = torch.zeros((), dtype=torch.int64, device=next((p.device for p in tree.leaves(params)), None))
        zeros = tree.map(torch.zeros_like, params)
        return AdamState(count, zeros, tree.map(torch.zeros_like, params), place(settings, params))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        checked_state(state, AdamState)
        checked_grads(grads, params)
        now = resolve(settings, state.hyper, state.steps)
        count = state.steps + 1
        flat, spec = tree.flatten(params)
        rows = [
            _leaf(g, m, v, p, now, count, decoupled)
            for g, m, v, p in zip(*map(tree.leaves, (grads, state.first, state.second)), flat)
        ]
        updates, first, second = ([row[column] for row in rows] for column in range(3))
        new = AdamState(count, tree.unflatten(spec, first), tree.unflatten(spec, second), state.hyper)
        return tree.unflatten(spec, updates), new

    def fused(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        checked_state(state, AdamState)
        now = {name: value.item() for name, value in resolve(settings, state.hyper, state.steps).items()}
        count = state.steps + 1
        kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        flat, spec = tree.flatten(params)
        others = (tree.leaves_like(spec, other, params) for other in (grads, state.first, state.second))
        rows = [_alike(*row) for row in zip(flat, *others)]
        new, g, first, second = ([row[column] for row in rows] for column in range(4))
        kernel(
            new,
            g,
            first,
            second,
            [],
            [count.to(torch.float32)] * len(flat),
            lr=now["lr"],
            beta1=now["b1"],
            beta2=now["b2"],
            weight_decay=now["weight_decay"],
            eps=now["eps"],
            amsgrad=False,
            maximize=False,
        )
        moments = tree.unflatten(spec, first), tree.unflatten(spec, second)
        return tree.unflatten(spec, new), AdamState(count, *moments, state.hyper)

    return Optimizer(init, update, fused, name, settings)


def _alike(*leaves: Tensor) -> tuple[Tensor, ...]:
    # The fused kernel walks memory, not indices: where strides differ (a gradient is often transposed, or expanded
    # from one number) it would mix elements up, or read past the end.
    first = leaves[0].stride()
    return leaves if all(leaf.stride() == first for leaf in leaves) else tuple(leaf.contiguous() for leaf in leaves)


def _leaf(
    g: Tensor, m: Tensor, v: Tensor, p: Tensor, now: dict[str, Tensor], count: Tensor, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    real = torch.float64 if p.dtype == torch.float64 else torch.float32

    def cast(value: Tensor) -> Tensor:
        # 0-d float64 against float32 leaves: cast once here, so that compiled kernels stay in the leaf's width.
        return value.to(real)

    lr, b1, b2, decay = now["lr"], now["b1"], now["b2"], now["weight_decay"]
    if not decoupled:
        g = g + cast(decay) * p
    m = m + cast(1 - b1) * (g - m)
    v = cast(b2) * v + cast(1 - b2) * g * g
    size = cast(lr / (1 - b1**count))
    root = cast(torch.sqrt(1 - b2**count))
    change = -size * m / (v.sqrt() / root + cast(now["eps"]))
    if decoupled:
        change = change - cast(lr * decay) * p
    # 0-d leaves of half precision would be widened by the 0-d hyperparameters.
    return change.to(p.dtype), m.to(p.dtype), v.to(p.dtype)
