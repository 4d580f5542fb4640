"""Schedules made of schedules: a warm-up before one, several one after another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.optim.base import Hyper, Schedule
from functrain.core.optim.schedules.decay import constant
from functrain.core.optim.schedules.numbers import number, whole


def warmup(steps: int, then: Hyper) -> Schedule:
    """Linear from 0 towards `then` in `steps` updates, and then `then` (a number or a schedule, from its own count 0).

    Update count gets (count + 1) / (steps + 1) of then's first value, so that no update is lost at a rate of 0.

    Raises `ArgumentError` for fewer than one step, and for a schedule that warms up already.

    >>> warmup(3, 1.0)(torch.tensor([0, 1, 2, 3, 4]))
    tensor([0.2500, 0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    after = _schedule(then)
    if "warmup" in after.values:
        raise ArgumentError(f"{after!r} warms up already: give warmup the schedule that comes after")

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        since = torch.clamp(count - values["warmup"], min=0.0)
        rise = torch.clamp((count + 1) / (values["warmup"] + 1), max=1.0)
        return rise * after.rule(since, values)

    return Schedule(f"warmup {after.name}", rule, {"warmup": whole("steps", steps), **after.values})


def join(parts: Mapping[int, Hyper]) -> Schedule:
    """Schedules one after another: each from its count on, as of its own count 0. Numbers are constants.

    The numbers of part i are called `part{i}_…`, the count that it begins at `at{i}`; in a state,
    `ft.with_hyper(state, lr_part1_peak=0.1, lr_at1=500)`.

    Raises `ArgumentError` unless there is a part at 0, and for counts that are not ints of at least 0.

    >>> from functrain.core.optim import linear
    >>> join({0: linear(0.0, 1.0, 2), 2: 1.0, 4: linear(1.0, 0.0, 2)})(torch.arange(1, 7))
    tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    counts = list(parts) if isinstance(parts, Mapping) else [None]
    if any(isinstance(at, bool) or not isinstance(at, int) or at < 0 for at in counts) or 0 not in counts:
        shown = counts if isinstance(parts, Mapping) else type(parts).__name__
        raise ArgumentError(f"join takes schedules by the counts (ints) they begin at, the first of them 0, got {shown}")
    rows = [(at, _schedule(parts[at])) for at in sorted(parts)]
    values: dict[str, float] = {}
    for place, (at, part) in enumerate(rows):
        values |= {f"at{place}": number("counts", at)} if place else {}
        values |= {f"part{place}_{name}": value for name, value in part.values.items()}

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        value = rows[0][1].rule(_only(count, count < values["at1"]) if len(rows) > 1 else count, _of(0, values))
        for place, (_, part) in enumerate(rows[1:], 1):
            begun = count >= values[f"at{place}"]
            running = begun & (count < values[f"at{place + 1}"]) if place + 1 < len(rows) else begun
            value = torch.where(begun, part.rule(_only(count - values[f"at{place}"], running), _of(place, values)), value)
        return value

    return Schedule(" then ".join(part.name for _, part in rows), rule, values)


def _schedule(hyper: Hyper) -> Schedule:
    return hyper if isinstance(hyper, Schedule) else constant(hyper)


def _only(count: Tensor, running: Tensor) -> Tensor:
    # A part before or after its time is asked for its first value: no other is sure to be finite there, nor its derivative.
    return torch.where(running, count, 0)


def _of(place: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"part{place}_"
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
