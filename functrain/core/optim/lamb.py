"""LAMB: Adam whose step on each leaf is as long as a share of the leaf's norm, for large batches.

    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    u = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε) + weight_decay · p
    p ← p − lr · (φ(‖p‖) / ‖u‖) · u            φ(z) = min(max(z, min_norm), max_norm)

The trust ratio φ(‖p‖) / ‖u‖ is one number a leaf, and 1 where either norm is 0.

Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020; the options
are those of NVIDIA's apex and of optax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.moments import moment_numbers, moment_settings, moments
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class LambState(NamedTuple):
    """The number of updates taken t, the first and second moments m and v, the hyperparameters."""

    steps: Tensor
    first: Tree
    second: Tree
    hyper: dict[str, Any]


def lamb(
    lr: Hyper = 1e-3,
    *,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-6,
    weight_decay: Hyper = 1e-2,
    min_norm: Hyper = 0.0,
    max_norm: Hyper | None = None,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    decoupled: bool = True,
) -> Optimizer:
    """LAMB, with its trust ratio computed leaf by leaf (norms of half-precision leaves in float32).

    - `min_norm`, `max_norm`: the bounds of φ, within which a leaf's norm counts (None: no upper bound);
    - `bias_correction=False`: no division by 1 − βᵗ;
    - `grad_averaging=False`: m ← β₁ m + g;
    - `decoupled=False`: the decay is part of the gradient, g + weight_decay · p, as in Adam.

    All but the last three are numbers or schedules. apex clips all gradients to a global norm of 1 beforehand: chain that.
    Raises `ArgumentError` for a negative number, a β outside [0, 1), and a `max_norm` below `min_norm`.

    >>> optimizer = lamb(0.1, weight_decay=0.0)
    >>> params = {"w": torch.full((4,), 2.0)}
    >>> updates, _ = optimizer.update({"w": torch.ones(4)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.2000, -0.2000, -0.2000, -0.2000])}
    """
    settings = {**moment_settings(lr, b1, b2, eps), **decay_settings(weight_decay), "min_norm": checked("min_norm", min_norm)}
    if max_norm is not None:
        settings["max_norm"] = checked("max_norm", max_norm)
        if isinstance(max_norm, int | float) and isinstance(min_norm, int | float) and max_norm < min_norm:
            raise ArgumentError(f"max_norm is {max_norm} and min_norm {min_norm}: expected bounds of φ in this order")
    asked = {"bias_correction": bias_correction, "grad_averaging": grad_averaging, "decoupled": decoupled}

    def rule(do: Arithmetic, p: Leaf, g: Leaf, m: Leaf, v: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
        if not decoupled:
            g = decayed(do, p, g, n)
        m, v = moments(do, g, m, v, n)
        u = do.div_(do.div(m, n["bias1"]), do.shift_(do.div_(do.sqrt(v), n["root"]), n["eps"]))
        if decoupled:
            # Within the step, whose length is set afterwards.
            u = decayed(do, p, u, n)
        ratios = do.each(lambda of, by: _ratio(of.clamp(min=n["min_norm"], max=n.get("max_norm")), by), do.norm(p), do.norm(u))
        do.descend(do.mul_(u, ratios), n["lr"])
        return m, v

    def numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
        given = moment_numbers(now, count)
        if not bias_correction:
            given |= {"bias1": 1.0, "root": 1.0}
        # The sum of gradients is 1 / (1 − β₁) times their average, which is what the state keeps.
        return given if grad_averaging else {**given, "bias1": given["bias1"] * given["fresh1"]}, {}

    buffers = {"first": torch.zeros_like, "second": torch.zeros_like}
    options = {name: value for name, value in asked.items() if not value}
    return leafwise("lamb", LambState, settings, numbers, rule, buffers=buffers, options=options)


def _ratio(of: Tensor, by: Tensor) -> Tensor:
    both = (of > 0) & (by > 0)
    return torch.where(both, of / torch.where(both, by, 1.0), 1.0)
