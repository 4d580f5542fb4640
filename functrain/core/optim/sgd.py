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

from functrain.core.errors import ArgumentError
from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number, choose
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Numbers, leafwise
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

    def rule(do: Arithmetic, p: Leaf, g: Leaf, *rest: Any) -> tuple[Leaf, ...]:
        *buffers, n = rest
        if "weight_decay" in n:
            g = do.add(g, p, n["weight_decay"])
        if not buffers:
            do.descend(g, n["lr"])
            return ()
        b = do.add_(do.mul_(buffers[0], n["momentum"]), g, n.get("fresh", 1))
        do.descend(do.add(g, b, n["momentum"]) if nesterov else b, n["lr"])
        return (b,)

    buffers = {} if momentum == 0.0 else {"momentum": torch.zeros_like}
    options = {"nesterov": True} if nesterov else {}
    return leafwise("sgd", SgdState, settings, _numbers, rule, buffers=buffers, options=options)


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    fresh = {"fresh": choose(count == 1, 1.0, 1 - now["dampening"])} if "dampening" in now else {}
    return {**now, **fresh}, {}
