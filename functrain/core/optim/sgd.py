"""Stochastic gradient descent, with momentum.

    g ← g + weight_decay · p
    b ← momentum · b + (1 − dampening) · g         (b ← g at the first update)
    u = g + momentum · b   (nesterov)   or   b   or, without momentum, g
    p ← p − lr · u

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013; in the
form of torch.optim.SGD.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.optim.base import Hyper, Optimizer, checked, checked_grads, checked_state, place, resolve
from functrain.core.tree import Tree


class SgdState(NamedTuple):
    """The number of updates taken, the momentum buffers (None without momentum), the hyperparameters."""

    steps: Tensor
    momentum: Tree
    hyper: dict[str, Any]


def sgd(
    lr: Hyper, *, momentum: Hyper = 0.0, dampening: Hyper = 0.0, weight_decay: Hyper = 0.0, nesterov: bool = False
) -> Optimizer:
    """Stochastic gradient descent: options and numbers as in torch.optim.SGD.

    `lr`, `momentum`, `dampening` and `weight_decay` are numbers or schedules; those that are 0 cost nothing.
    Raises `ArgumentError` for negative numbers, and for Nesterov without momentum or with dampening.

    >>> optimizer = sgd(0.5)
    >>> params = {"w": torch.ones(2)}
    >>> updates, _ = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.5000, -0.5000])}
    """
    given = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    settings = {"lr": checked("lr", lr)} | {name: checked(name, value) for name, value in given.items() if value != 0.0}
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ArgumentError("nesterov needs momentum above 0 and no dampening")
    if momentum == 0.0:
        settings.pop("dampening", None)

    def init(params: Tree) -> SgdState:
        buffers = None if momentum == 0.0 else tree.map(torch.zeros_like, params)
        count = torch.zeros((), dtype=torch.int64, device=next((p.device for p in tree.leaves(params)), None))
        return SgdState(count, buffers, place(settings, params))

    def update(grads: Tree, state: SgdState, params: Tree) -> tuple[Tree, SgdState]:
        checked_state(state, SgdState)
        checked_grads(grads, params)
        now = resolve(settings, state.hyper, state.steps)
        if "weight_decay" in now:
            grads = tree.map(lambda g, p: g + now["weight_decay"].to(p.dtype) * p, grads, params)
        buffers, used = state.momentum, grads
        if buffers is not None:
            buffers = used = tree.map(lambda b, g: _buffer(b, g, now, state.steps), buffers, grads)
            if nesterov:
                used = tree.map(lambda g, b: g + now["momentum"].to(g.dtype) * b, grads, buffers)
        updates = tree.map(lambda u: -now["lr"].to(u.dtype) * u, used)
        return updates, SgdState(state.steps + 1, buffers, state.hyper)

    return Optimizer(init, update, None, "sgd", settings | ({"nesterov": True} if nesterov else {}))


def _buffer(buffer: Tensor, grad: Tensor, now: dict[str, Tensor], count: Tensor) -> Tensor:
    if "dampening" in now:
        grad = torch.where(count == 0, 1.0, 1.0 - now["dampening"]).to(grad.dtype) * grad
    return now["momentum"].to(buffer.dtype) * buffer + grad
