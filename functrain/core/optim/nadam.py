"""NAdam: Adam with Nesterov's momentum, on a schedule of its own.

    g ← g + weight_decay · p                        or, decoupled,  p ← p − lr · weight_decay · p
    μₜ = β₁ (1 − ½ · 0.96^(t · momentum_decay))
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    m̂ = (1 − μₜ) / (1 − Πᵢ≤ₜ μᵢ) · g + μₜ₊₁ / (1 − Πᵢ≤ₜ₊₁ μᵢ) · m
    p ← p − lr · m̂ / (√(v / (1 − β₂ᵗ)) + ε)

Source: Dozat, "Incorporating Nesterov momentum into Adam", ICLR 2016 workshop; in the form of torch.optim.NAdam.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.moments import moment_numbers, moment_settings, moments
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class NadamState(NamedTuple):
    """The number of updates taken t, the product of all μ, the moments m and v, the hyperparameters."""

    steps: Tensor
    product: Tensor
    first: Tree
    second: Tree
    hyper: dict[str, Any]


def nadam(
    lr: Hyper = 2e-3,
    *,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum_decay: Hyper = 4e-3,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """NAdam: options and numbers as in torch.optim.NAdam; the product of momenta is kept in float64.

    All but the last are numbers or schedules. Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = nadam(0.1, momentum_decay=0.0)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.1056])}
    """
    settings = moment_settings(lr, b1, b2, eps) | {"momentum_decay": checked("momentum_decay", momentum_decay)}

    def rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, v: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
        g = decayed(do, p, g, n, decoupled=decoupled_weight_decay)
        m, v = moments(do, g, m, v, n)
        size = do.shift_(do.div_(do.sqrt(v), n["root"]), n["eps"])
        do.descend_ratio(g, size, n["size_grad"])
        do.descend_ratio(m, size, n["size_first"])
        return m, v

    return leafwise(
        "nadam",
        NadamState,
        settings | decay_settings(weight_decay),
        _numbers,
        rule,
        buffers=dict.fromkeys(("first", "second"), torch.zeros_like),
        scalars={"product": 1.0},
        options={"decoupled_weight_decay": True} if decoupled_weight_decay else {},
    )


def _numbers(now: Numbers, count: Number, past: Numbers) -> tuple[Numbers, Numbers]:
    momentum, following = _momentum(now, count), _momentum(now, count + 1)
    product = past["product"] * momentum
    sizes = {
        "size_grad": now["lr"] * (1 - momentum) / (1 - product),
        "size_first": now["lr"] * following / (1 - product * following),
    }
    return {**moment_numbers(now, count), **sizes}, {"product": product}


def _momentum(now: Numbers, count: Number) -> Number:
    return now["b1"] * (1 - 0.5 * 0.96 ** (count * now["momentum_decay"]))
