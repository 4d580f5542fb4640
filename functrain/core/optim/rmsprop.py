"""RMSprop: gradients divided by the root of their mean square, or of their variance, with momentum.

    g ← g + weight_decay · p
    v ← α v + (1 − α) g²
    centered:   a ← α a + (1 − α) g,   and v − a² in the place of v
    p ← p − lr · g / (√v + ε)
    momentum:   b ← momentum · b + g / (√v + ε),   p ← p − lr · b

Sources: Tieleman and Hinton, "Lecture 6.5: RMSprop", Coursera 2012; Graves, "Generating sequences with recurrent neural
networks", 2013, for the centred form; in the form of torch.optim.RMSprop.
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


class RmspropState(NamedTuple):
    """The number of updates taken, v (centred: v − a²), a (or None), the momentum b (or None), the hyperparameters."""

    steps: Tensor
    second: Tree
    mean: Tree
    momentum: Tree
    hyper: dict[str, Any]


def rmsprop(
    lr: Hyper = 1e-2,
    *,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.0,
    centered: bool = False,
) -> Optimizer:
    """RMSprop: options and numbers as in torch.optim.RMSprop.

    All but `centered` are numbers or schedules; a `weight_decay` or `momentum` of 0 costs nothing. The variance of the
    centred form is kept as such, never below 0: as a difference of two moments, rounding would make a NaN of it where
    gradients hardly change. Raises `ArgumentError` for a negative number or an α outside [0, 1).

    >>> optimizer = rmsprop(0.1, alpha=0.75)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.2000])}
    """
    settings = {"lr": checked("lr", lr), "alpha": checked("alpha", alpha, 0.0, 1.0), "eps": checked("eps", eps)}
    settings |= decay_settings(weight_decay) | ({} if momentum == 0.0 else {"momentum": checked("momentum", momentum)})

    def rule(do: Arithmetic, p: Leaf, g: Leaf, v: Leaf, *rest: Any) -> tuple[Leaf, ...]:
        *others, n = rest
        g = decayed(do, p, g, n)
        v = do.mul_(v, n["alpha"])
        if centered:
            # v − a² after the update, as a sum of squares: α (v − a²) + α (1 − α) (g − a)², with a from before.
            away = do.add(g, others[0], -1)
            v = do.addcmul_(v, away, away, n["spread"])
            others[0] = do.add_(others[0], away, n["fresh"])
            size = do.shift_(do.sqrt_into(away, v), n["eps"])
        else:
            v = do.addcmul_(v, g, g, n["fresh"])
            size = do.shift_(do.sqrt(v), n["eps"])
        if momentum == 0.0:
            do.descend_ratio(g, size, n["lr"])
        else:
            others[-1] = do.addcdiv_(do.mul_(others[-1], n["momentum"]), g, size)
            do.descend(others[-1], n["lr"])
        return v, *others

    names = ["second", *(["mean"] if centered else []), *([] if momentum == 0.0 else ["momentum"])]
    buffers = dict.fromkeys(names, torch.zeros_like)
    options = {"centered": True} if centered else {}
    return leafwise("rmsprop", RmspropState, settings, _numbers, rule, buffers=buffers, options=options)


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    fresh = 1 - now["alpha"]
    return {**now, "fresh": fresh, "spread": now["alpha"] * fresh}, {}
