"""Lion: the sign of a momentum, with decoupled weight decay.

    u = sign(β₁ m + (1 − β₁) g)
    p ← p − lr · (u + weight_decay · p)
    m ← β₂ m + (1 − β₂) g

Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class LionState(NamedTuple):
    """The number of updates taken, the momentum m, the hyperparameters."""

    steps: Tensor
    momentum: Tree
    hyper: dict[str, Any]


def lion(lr: Hyper = 1e-4, *, b1: Hyper = 0.9, b2: Hyper = 0.99, weight_decay: Hyper = 0.0) -> Optimizer:
    """Lion: every element moves by `lr`, whatever the size of its gradient; so `lr` is 3 to 10 times below Adam's.

    Every argument is a number or a schedule. The sign is piecewise constant: no derivative flows through it to the
    gradients and to the βs (it is 0, not NaN); to the params and the other numbers it does.
    Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = lion(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> updates, _ = optimizer.update({"w": torch.tensor([5.0, -0.01])}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.1000,  0.1000])}
    """
    settings = {
        "lr": checked("lr", lr),
        "b1": checked("b1", b1, 0.0, 1.0),
        "b2": checked("b2", b2, 0.0, 1.0),
        **decay_settings(weight_decay),
    }
    return leafwise("lion", LionState, settings, _numbers, _rule, buffers={"momentum": torch.zeros_like})


def _rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, n: Numbers) -> tuple[Leaf]:
    decayed(do, p, g, n, decoupled=True)
    do.descend(do.sign(do.lerp(m, g, n["fresh1"])), n["lr"])
    return (do.lerp_(m, g, n["fresh2"]),)


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    return {**now, "fresh1": 1 - now["b1"], "fresh2": 1 - now["b2"]}, {}
