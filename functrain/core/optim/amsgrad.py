"""AMSGrad: Adam, divided by the largest second moment so far.

    g ← g + weight_decay · p                        or, decoupled,  p ← p − lr · weight_decay · p
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    w ← max(w, v)
    p ← p − lr · (m / (1 − β₁ᵗ)) / (√(w / (1 − β₂ᵗ)) + ε)

Source: Reddi, Kale and Kumar, "On the convergence of Adam and beyond", ICLR 2018; in the form of torch.optim's Adam and
AdamW with amsgrad=True.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.optim.adam import adam_kernel
from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.moments import moment_numbers, moment_settings, moments
from functrain.core.optim.weight_decay import decayed
from functrain.core.tree import Tree


class AmsgradState(NamedTuple):
    """The number of updates taken t, the moments m and v, the largest second moment w, the hyperparameters."""

    steps: Tensor
    first: Tree
    second: Tree
    largest: Tree
    hyper: dict[str, Any]


def amsgrad(
    lr: Hyper = 1e-3,
    *,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """AMSGrad: numbers as in torch.optim.Adam with amsgrad=True; with `decoupled_weight_decay`, of AdamW.

    All but the last are numbers or schedules. Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = amsgrad(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.1000])}
    """
    settings = {**moment_settings(lr, b1, b2, eps), "weight_decay": checked("weight_decay", weight_decay)}

    def rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, v: Leaf, w: Leaf, n: Numbers) -> tuple[Leaf, Leaf, Leaf]:
        g = decayed(do, p, g, n, decoupled=decoupled_weight_decay)
        m, v = moments(do, g, m, v, n)
        w = do.maximum_(w, v)
        do.descend_ratio(m, do.shift_(do.div_(do.sqrt(w), n["root"]), n["eps"]), n["size"])
        return m, v, w

    return leafwise(
        "amsgrad",
        AmsgradState,
        settings,
        _numbers,
        rule,
        buffers=dict.fromkeys(("first", "second", "largest"), torch.zeros_like),
        kernel=adam_kernel(decoupled_weight_decay, amsgrad=True),
        options={"decoupled_weight_decay": True} if decoupled_weight_decay else {},
    )


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    numbers = moment_numbers(now, count)
    return {**numbers, "size": now["lr"] / numbers["bias1"]}, {}
