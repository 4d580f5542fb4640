"""Adamax: Adam, divided by a decaying maximum in place of the second moment.

    g ← g + weight_decay · p
    m ← β₁ m + (1 − β₁) g
    u ← max(β₂ u, |g| + ε)
    p ← p − lr / (1 − β₁ᵗ) · m / u

Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, section 7.1; in the form of
torch.optim.Adamax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.moments import moment_settings
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class AdamaxState(NamedTuple):
    """The number of updates taken t, the first moment m, the decaying maximum u, the hyperparameters."""

    steps: Tensor
    first: Tree
    largest: Tree
    hyper: dict[str, Any]


def adamax(lr: Hyper = 2e-3, *, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, weight_decay: Hyper = 0.0) -> Optimizer:
    """Adamax: numbers as in torch.optim.Adamax.

    Every argument is a number or a schedule. Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = adamax(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.1000])}
    """
    settings = moment_settings(lr, b1, b2, eps) | decay_settings(weight_decay)
    buffers = dict.fromkeys(("first", "largest"), torch.zeros_like)
    return leafwise("adamax", AdamaxState, settings, _numbers, _rule, buffers=buffers)


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    return {**now, "fresh": 1 - now["b1"], "size": now["lr"] / (1 - now["b1"] ** count)}, {}


def _rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, u: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
    g = decayed(do, p, g, n)
    m = do.lerp_(m, g, n["fresh"])
    size = do.abs_(g) if "weight_decay" in n else do.abs(g)
    u = do.maximum_(do.mul_(u, n["b2"]), do.shift_(size, n["eps"]))
    do.descend_ratio(m, u, n["size"])
    return m, u
