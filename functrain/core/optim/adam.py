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

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Kernel, Numbers, leafwise
from functrain.core.optim.moments import moment_numbers, moment_settings, moments
from functrain.core.optim.weight_decay import decayed
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
    settings = {**moment_settings(lr, b1, b2, eps), "weight_decay": checked("weight_decay", weight_decay)}

    def rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, v: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
        g = decayed(do, p, g, n, decoupled=decoupled)
        m, v = moments(do, g, m, v, n)
        do.descend_ratio(m, do.shift_(do.div_(do.sqrt(v), n["root"]), n["eps"]), n["size"])
        return m, v

    buffers = {"first": torch.zeros_like, "second": torch.zeros_like}
    return leafwise(name, AdamState, settings, _numbers, rule, buffers=buffers, kernel=adam_kernel(decoupled))


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    known = moment_numbers(now, count)
    return {**known, "size": now["lr"] / known["bias1"]}, {}


def adam_kernel(decoupled: bool, amsgrad: bool = False) -> Kernel:
    """torch's fused kernel of Adam's family; with `amsgrad` there is a third buffer, the largest second moment."""
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def run(
        params: list[Tensor], grads: list[Tensor], buffers: list[list[Tensor]], now: dict[str, float], count: Tensor
    ) -> None:
        first, second = buffers[:2]
        kernel(
            params,
            grads,
            first,
            second,
            buffers[2] if amsgrad else [],
            [count.to(torch.float32)] * len(params),
            lr=now["lr"],
            beta1=now["b1"],
            beta2=now["b2"],
            weight_decay=now["weight_decay"],
            eps=now["eps"],
            amsgrad=amsgrad,
            maximize=False,
        )

    return run
