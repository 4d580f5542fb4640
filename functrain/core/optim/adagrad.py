"""Adagrad: gradients divided by the root of the sum of all their squares.

    g ← g + weight_decay · p
    s ← s + g²                                      s starts at initial_accumulator_value
    p ← p − lr / (1 + (t − 1) · lr_decay) · g / (√s + ε)

Source: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR
2011; in the form of torch.optim.Adagrad.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number
from functrain.core.optim.base import Hyper, Optimizer, Schedule, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.tree import Tree


class AdagradState(NamedTuple):
    """The number of updates taken t, the sum of squares s, the hyperparameters."""

    steps: Tensor
    squares: Tree
    hyper: dict[str, Any]


def adagrad(
    lr: Hyper = 1e-2,
    *,
    lr_decay: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Hyper = 1e-10,
) -> Optimizer:
    """Adagrad: options and numbers as in torch.optim.Adagrad.

    All but `initial_accumulator_value` are numbers or schedules. Raises `ArgumentError` for a negative number.

    >>> optimizer = adagrad(0.1, initial_accumulator_value=3.0)
    >>> params = {"w": torch.ones(1)}
    >>> updates, _ = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates
    {'w': tensor([-0.0500])}
    """
    given = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
    settings = {name: checked(name, value) for name, value in given.items()}
    if isinstance(initial_accumulator_value, Schedule):
        raise ArgumentError(f"initial_accumulator_value must be a number, got {initial_accumulator_value!r}")
    checked("initial_accumulator_value", initial_accumulator_value)
    return leafwise(
        "adagrad",
        AdagradState,
        settings,
        _numbers,
        _rule,
        buffers={"squares": lambda leaf: torch.full_like(leaf, initial_accumulator_value)},
        kernel=_kernel,
        options={"initial_accumulator_value": initial_accumulator_value} if initial_accumulator_value else {},
    )


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    return {**now, "size": now["lr"] / (1 + (count - 1) * now["lr_decay"])}, {}


def _rule(do: Arithmetic, p: Leaf, g: Leaf, s: Leaf, n: Numbers) -> tuple[Leaf]:
    g = do.add(g, p, n["weight_decay"])
    s = do.addcmul_(s, g, g)
    do.descend_ratio(g, do.shift_(do.sqrt(s), n["eps"]), n["size"])
    return (s,)


def _kernel(
    params: list[Tensor], grads: list[Tensor], buffers: list[list[Tensor]], now: dict[str, float], count: Tensor
) -> None:
    steps = [count.to(torch.float32)] * len(params)
    torch._fused_adagrad_(
        params,
        grads,
        buffers[0],
        steps,
        lr=now["lr"],
        lr_decay=now["lr_decay"],
        weight_decay=now["weight_decay"],
        eps=now["eps"],
        maximize=False,
    )
