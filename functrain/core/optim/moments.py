"""The two moments of gradients that Adam's family keeps.

    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²

Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015.
"""

from __future__ import annotations

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number, root
from functrain.core.optim.base import Hyper, Settings, checked
from functrain.core.optim.leafwise import Numbers


def moment_settings(lr: Hyper, b1: Hyper, b2: Hyper, eps: Hyper) -> Settings:
    """The checked settings of a rate, of both moments, and of ε."""
    return {
        "lr": checked("lr", lr),
        "b1": checked("b1", b1, 0.0, 1.0),
        "b2": checked("b2", b2, 0.0, 1.0),
        "eps": checked("eps", eps),
    }


def moment_numbers(now: Numbers, count: Number) -> Numbers:
    """What the moments of update `count` need, 1 − β₁ᵗ as `bias1`, and √(1 − β₂ᵗ) as `root`."""
    b1, b2 = now["b1"], now["b2"]
    return {**now, "fresh1": 1 - b1, "fresh2": 1 - b2, "bias1": 1 - b1**count, "root": root(1 - b2**count)}


def moments(do: Arithmetic, g: Leaf, m: Leaf, v: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
    """Both moments after a gradient."""
    return do.lerp_(m, g, n["fresh1"]), do.addcmul_(do.mul_(v, n["b2"]), g, g, n["fresh2"])
