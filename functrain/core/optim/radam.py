"""RAdam: Adam, with its step rectified for how little the second moment is known at first.

    g ← g + weight_decay · p                        or, decoupled,  p ← p − lr · weight_decay · p
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    ρ∞ = 2 / (1 − β₂) − 1
    ρ = ρ∞ − 2 t β₂ᵗ / (1 − β₂ᵗ)
    r = √((ρ − 4) (ρ − 2) ρ∞ / ((ρ∞ − 4) (ρ∞ − 2) ρ))
    p ← p − lr · (m / (1 − β₁ᵗ)) · r √(1 − β₂ᵗ) / (√v + ε)      where ρ > 5
    p ← p − lr · (m / (1 − β₁ᵗ))                                elsewhere

Source: Liu et al., "On the variance of the adaptive learning rate and beyond", ICLR 2020; in the form of torch.optim.RAdam.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number, choose, larger, root
from functrain.core.optim.base import Hyper, Optimizer
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.moments import moment_numbers, moment_settings, moments
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class RadamState(NamedTuple):
    """The number of updates taken t, the moments m and v, the hyperparameters."""

    steps: Tensor
    first: Tree
    second: Tree
    hyper: dict[str, Any]


def radam(
    lr: Hyper = 1e-3,
    *,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """RAdam: options and numbers as in torch.optim.RAdam.

    All but the last are numbers or schedules. Raises `ArgumentError` for a negative number or a β outside [0, 1).

    >>> optimizer = radam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.full((1,), 3.0)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.3000])}
    """

    def rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, v: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
        g = decayed(do, p, g, n, decoupled=decoupled_weight_decay)
        m, v = moments(do, g, m, v, n)
        do.descend_ratio(m, do.shift_(do.mul_(do.sqrt(v), n["adaptive"]), n["floor"]), n["size"])
        return m, v

    return leafwise(
        "radam",
        RadamState,
        moment_settings(lr, b1, b2, eps) | decay_settings(weight_decay),
        _numbers,
        rule,
        buffers=dict.fromkeys(("first", "second"), torch.zeros_like),
        options={"decoupled_weight_decay": True} if decoupled_weight_decay else {},
    )


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    numbers, power = moment_numbers(now, count), now["b2"] ** count
    limit = 2 / (1 - now["b2"]) - 1
    length = limit - 2 * count * power / (1 - power)
    rectified = length > 5
    # At 5 and above the root is real and nothing is divided by 0; below, its value is not used.
    most, known = larger(limit, 5.0), larger(length, 5.0)
    share = root((known - 4) * (known - 2) * most / ((most - 4) * (most - 2) * known))
    size = now["lr"] / numbers["bias1"]
    chosen = {
        # The denominator: 1 · √v + ε, or 0 · √v + 1.
        "adaptive": choose(rectified, 1.0, 0.0),
        "floor": choose(rectified, now["eps"], 1.0),
        "size": size * choose(rectified, share * numbers["root"], 1.0),
    }
    return {**numbers, **chosen}, {}
