"""Adadelta: gradients times the root of the mean square of past updates, divided by that of gradients.

    g ← g + weight_decay · p
    v ← ρ v + (1 − ρ) g²
    u = √((s + ε) / (v + ε)) · g
    s ← ρ s + (1 − ρ) u²
    p ← p − lr · u

Source: Zeiler, "ADADELTA: an adaptive learning rate method", 2012; in the form of torch.optim.Adadelta.
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


class AdadeltaState(NamedTuple):
    """The number of updates taken, the mean squares v of gradients and s of updates, the hyperparameters."""

    steps: Tensor
    second: Tree
    moved: Tree
    hyper: dict[str, Any]


def adadelta(lr: Hyper = 1.0, *, rho: Hyper = 0.9, eps: Hyper = 1e-6, weight_decay: Hyper = 0.0) -> Optimizer:
    """Adadelta: numbers as in torch.optim.Adadelta.

    Every argument is a number or a schedule. Raises `ArgumentError` for a negative number or a ρ outside [0, 1).

    >>> optimizer = adadelta(rho=0.75, eps=0.25)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.full((1,), 3**0.5)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.8660])}
    """
    settings = {"lr": checked("lr", lr), "rho": checked("rho", rho, 0.0, 1.0), "eps": checked("eps", eps)}
    settings |= decay_settings(weight_decay)
    buffers = dict.fromkeys(("second", "moved"), torch.zeros_like)
    return leafwise("adadelta", AdadeltaState, settings, _numbers, _rule, buffers=buffers)


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    return {**now, "fresh": 1 - now["rho"]}, {}


def _rule(do: Arithmetic, p: Leaf, g: Leaf, v: Leaf, s: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
    g = decayed(do, p, g, n)
    v = do.addcmul_(do.mul_(v, n["rho"]), g, g, n["fresh"])
    ratio = do.div_(do.shift(s, n["eps"]), do.shift(v, n["eps"]))
    u = do.mul_(do.sqrt_(ratio), g)
    do.descend(u, n["lr"])
    return v, do.addcmul_(do.mul_(s, n["rho"]), u, u, n["fresh"])
