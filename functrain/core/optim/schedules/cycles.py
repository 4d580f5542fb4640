"""Schedules that rise and fall: warm restarts, one cycle."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.optim.base import Schedule
from functrain.core.optim.schedules.numbers import between, half_cosine, number, whole


def restarts(peak: float, steps: int, factor: int = 2, end: float = 0.0) -> Schedule:
    """Half a cosine from `peak` towards `end` in `steps` updates, then again from `peak`, each time `factor` times as long.

    Cycle k begins at count bₖ = steps · (1 + factor + … + factorᵏ⁻¹) and is steps · factorᵏ updates long; in it the value is
    end + (peak − end) · ½ (1 + cos(π · (count − bₖ) / (steps · factorᵏ))).

    Raises `ArgumentError` for fewer than one step, a factor below 1, and for numbers that are not finite.

    Source: Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017, whose T₀ and T_mult
    `steps` and `factor` are.

    >>> restarts(1.0, 2)(torch.tensor([0, 1, 2, 4, 6]))
    tensor([1.0000, 0.5000, 1.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    values = {
        "peak": number("peak", peak),
        "steps": whole("steps", steps),
        "factor": whole("factor", factor),
        "end": number("end", end),
    }
    return Schedule("restarts", _restarts, values)


# Counts are whole: a cycle begins at the first that lies less than this before bₖ, whatever rounding has made of bₖ.
_SLACK = 0.01


def _restarts(count: Tensor, values: dict[str, Tensor]) -> Tensor:
    steps, factor = values["steps"], values["factor"]
    grows = factor > 1
    # Both kinds of cycles are computed; each has to be finite where the other is meant.
    ratio = torch.where(grows, factor, 2.0)
    # A whole count plus a Python float would be of single precision.
    late = count.to(steps.dtype) + _SLACK

    def begins(cycle: Tensor) -> Tensor:
        return steps * (ratio**cycle - 1) / (ratio - 1)

    cycle = torch.floor(torch.log1p(late / steps * (ratio - 1)) / torch.log(ratio)).detach()
    # The logarithm may be off by one next to a border.
    cycle = cycle + (begins(cycle + 1) <= late).to(cycle.dtype) - (begins(cycle) > late).to(cycle.dtype)
    begin = torch.where(grows, begins(cycle), steps * torch.floor(late / steps).detach())
    length = torch.where(grows, steps * ratio**cycle, steps)
    share = torch.clamp((count - begin) / length, min=0.0, max=1.0)
    return between(values["peak"], values["end"], half_cosine(share))


Anneal = Literal["cos", "linear"]


def one_cycle(
    peak: float,
    steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal_strategy: Anneal = "cos",
) -> Schedule:
    """One rise to `peak` and one fall far below where it began, in `steps` updates; then the last value for ever.

    From peak / div_factor at count 0 to `peak` at count pct_start · steps − 1, and on to peak / (div_factor ·
    final_div_factor) at count steps − 1, along half a cosine or a straight line. Options and numbers as in torch's
    OneCycleLR, whose cycling of the momentum is another schedule here: `sgd(one_cycle(…), momentum=join(…))`.

    Raises `ArgumentError` for fewer than one step, `pct_start` outside [0, 1), factors that are not above 0, another strategy,
    and for numbers that are not finite.

    Source: Smith and Topin, "Super-convergence: very fast training of neural networks using large learning rates", 2018.

    >>> one_cycle(1.0, 10, div_factor=10, final_div_factor=10)(torch.tensor([0, 2, 9, 99]))
    tensor([0.1000, 1.0000, 0.0100, 0.0100], dtype=torch.float64)
    """
    values = {
        "peak": number("peak", peak),
        "steps": whole("steps", steps),
        "pct_start": number("pct_start", pct_start, 0.0, 1.0),
        "div_factor": number("div_factor", div_factor),
        "final_div_factor": number("final_div_factor", final_div_factor),
    }
    for name in ("div_factor", "final_div_factor"):
        if values[name] <= 0:
            raise ArgumentError(f"{name} must be a finite number above 0, got {values[name]:g}")
    if anneal_strategy not in get_args(Anneal):
        raise ArgumentError(f"anneal_strategy must be 'cos' or 'linear', got {anneal_strategy!r}")
    curve = half_cosine if anneal_strategy == "cos" else _straight

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        start = values["peak"] / values["div_factor"]
        turn, last = values["pct_start"] * values["steps"] - 1, values["steps"] - 1
        # A cycle that does not rise has its turn at or before count 0.
        up = torch.clamp(count / torch.where(turn > 0, turn, 1.0), max=1.0)
        down = torch.clamp((count - turn) / (last - turn), min=0.0, max=1.0)
        rise = between(start, values["peak"], curve(up))
        fall = between(values["peak"], start / values["final_div_factor"], curve(down))
        return torch.where(count < turn, rise, fall)

    return Schedule(f"one_cycle {anneal_strategy}", rule, values)


def _straight(share: Tensor) -> Tensor:
    return share
