"""Schedules: a hyperparameter as a function of the count of updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.optim.base import Hyper, Schedule


def constant(value: float) -> Schedule:
    """The same value for ever.

    >>> constant(0.1)(1000)
    tensor(0.1000, dtype=torch.float64)
    """
    return Schedule("constant", lambda count, values: values["value"] + 0 * count, {"value": float(value)})


def _cosine(count: Tensor, values: dict[str, Tensor]) -> Tensor:
    share = torch.clamp(count / values["steps"], max=1.0)
    return values["end"] + (values["peak"] - values["end"]) * 0.5 * (1 + torch.cos(math.pi * share))


def cosine(peak: float, steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from `peak` at count 0 to `end` at count `steps`, and `end` from there on.

    end + (peak − end) · ½ (1 + cos(π · count / steps)).

    Raises `ArgumentError` for fewer than one step.

    Source: Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017.

    >>> cosine(1.0, 10)(torch.tensor([0, 5, 10, 99]))
    tensor([1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    _positive("steps", steps)
    return Schedule("cosine", _cosine, {"peak": float(peak), "steps": float(steps), "end": float(end)})


def warmup(steps: int, then: Hyper) -> Schedule:
    """Linear from 0 towards `then` in `steps` updates, and then `then` (a number or a schedule, from its own count 0).

    Update count gets (count + 1) / (steps + 1) of then's first value, so that no update is lost at a rate of 0.

    >>> warmup(3, 1.0)(torch.tensor([0, 1, 2, 3, 4]))
    tensor([0.2500, 0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    _positive("steps", steps)
    after = then if isinstance(then, Schedule) else constant(then)
    if "warmup" in after.values:
        raise ArgumentError(f"{after!r} warms up already: give warmup the schedule that comes after")

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        since = torch.clamp(count - values["warmup"], min=0.0)
        rise = torch.clamp((count + 1) / (values["warmup"] + 1), max=1.0)
        return rise * after.rule(since, values)

    return Schedule(f"warmup {after.name}", rule, {"warmup": float(steps), **after.values})


def piecewise(start: float, factors: Mapping[int, float]) -> Schedule:
    """`start`, multiplied by each factor from its count on.

    Raises `ArgumentError` for a negative count.

    >>> piecewise(1.0, {2: 0.5, 4: 0.5})(torch.arange(6))
    tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    if any(isinstance(at, bool) or not isinstance(at, int) or at < 0 for at in factors):
        raise ArgumentError(f"piecewise takes counts of updates (ints from 0), got {list(factors)}")
    values = {"start": float(start)}
    for number, (at, factor) in enumerate(sorted(factors.items())):
        values |= {f"at{number}": float(at), f"factor{number}": float(factor)}

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        value = values["start"] + 0 * count
        for number in range(len(factors)):
            value = value * torch.where(count >= values[f"at{number}"], values[f"factor{number}"], 1.0)
        return value

    return Schedule("piecewise", rule, values)


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an int of at least 1, got {value!r}")
