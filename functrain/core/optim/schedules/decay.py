"""Schedules that go one way: constant, linear, cosine, exponential, by pieces, by the inverse root."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.optim.base import Schedule
from functrain.core.optim.schedules.numbers import between, half_cosine, number, whole


def constant(value: float) -> Schedule:
    """The same value for ever.

    Raises `ArgumentError` for what is no finite number.

    >>> constant(0.1)(1000)
    tensor(0.1000, dtype=torch.float64)
    """
    return Schedule("constant", lambda count, values: values["value"] + 0 * count, {"value": number("value", value)})


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line from `start` at count 0 to `end` at count `steps`, and `end` from there on.

    start + (end − start) · count / steps.

    Raises `ArgumentError` for fewer than one step, and for numbers that are not finite.

    >>> linear(1.0, 0.0, 4)(torch.tensor([0, 1, 4, 99]))
    tensor([1.0000, 0.7500, 0.0000, 0.0000], dtype=torch.float64)
    """
    values = {"start": number("start", start), "end": number("end", end), "steps": whole("steps", steps)}
    return Schedule("linear", _linear, values)


def _linear(count: Tensor, values: dict[str, Tensor]) -> Tensor:
    return between(values["start"], values["end"], torch.clamp(count / values["steps"], max=1.0))


def cosine(peak: float, steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from `peak` at count 0 to `end` at count `steps`, and `end` from there on.

    end + (peak − end) · ½ (1 + cos(π · count / steps)).

    Raises `ArgumentError` for fewer than one step, and for numbers that are not finite.

    Source: Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017.

    >>> cosine(1.0, 10)(torch.tensor([0, 5, 10, 99]))
    tensor([1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    values = {"peak": number("peak", peak), "steps": whole("steps", steps), "end": number("end", end)}
    return Schedule("cosine", _cosine, values)


def _cosine(count: Tensor, values: dict[str, Tensor]) -> Tensor:
    return between(values["peak"], values["end"], half_cosine(torch.clamp(count / values["steps"], max=1.0)))


def exponential(start: float, factor: float, *, every: int = 1, staircase: bool = False, end: float | None = None) -> Schedule:
    """`start`, multiplied by `factor` once in `every` updates: as a curve, or in steps with `staircase`.

    start · factor^(count / every), the exponent rounded down with `staircase`; where it has gone past `end`, `end`.

    Raises `ArgumentError` for a factor that is not above 0, for one above 1 without an `end` (it would grow without bound),
    for an `end` on the wrong side of `start`, and for numbers that are not finite.

    >>> exponential(1.0, 0.5)(torch.arange(4))
    tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    >>> exponential(1.0, 0.1, every=2, staircase=True, end=0.05)(torch.arange(6))
    tensor([1.0000, 1.0000, 0.1000, 0.1000, 0.0500, 0.0500], dtype=torch.float64)
    """
    values = {"start": number("start", start), "factor": number("factor", factor), "every": whole("every", every)}
    grows = factor > 1
    if factor <= 0:
        raise ArgumentError(f"factor must be a finite number above 0, got {factor!r}")
    if grows and end is None:
        raise ArgumentError(f"a factor of {factor:g} grows without bound: say where it ends, exponential(…, end=…)")
    if end is not None:
        values["end"] = number("end", end, 0.0)
        if start <= 0 or (end < start if grows else end > start):
            side = "at least" if grows else "at most"
            raise ArgumentError(f"from a start above 0, a factor of {factor:g} ends at {side} start: got {start=!r}, {end=!r}")

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        times = count / values["every"]
        if staircase:
            times = torch.floor(times)
        if end is None:
            return values["start"] * values["factor"] ** times
        # By logarithms: the power itself overflows, and a derivative through it would be no number.
        way, whole_way = times * torch.log(values["factor"]), torch.log(values["end"] / values["start"])
        over = way >= whole_way if grows else way <= whole_way
        power = values["factor"] ** torch.where(over, 0.0, times)
        return torch.where(over, values["end"], values["start"] * power)

    return Schedule("exponential staircase" if staircase else "exponential", rule, values)


def piecewise(start: float, factors: Mapping[int, float]) -> Schedule:
    """`start`, multiplied by each factor from its count on.

    Raises `ArgumentError` for counts that are not ints of at least 0, and for numbers that are not finite.

    >>> piecewise(1.0, {2: 0.5, 4: 0.5})(torch.arange(6))
    tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    if any(isinstance(at, bool) or not isinstance(at, int) or at < 0 for at in factors):
        raise ArgumentError(f"piecewise takes counts of updates (ints from 0), got {list(factors)}")
    values = {"start": number("start", start)}
    for place, (at, factor) in enumerate(sorted(factors.items())):
        values |= {f"at{place}": number("counts", at), f"factor{place}": number("factors", factor)}

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        value = values["start"] + 0 * count
        for place in range(len(factors)):
            value = value * torch.where(count >= values[f"at{place}"], values[f"factor{place}"], 1.0)
        return value

    return Schedule("piecewise", rule, values)


def inverse_root(peak: float, warmup: int, *, hold: bool = False) -> Schedule:
    """Linear up to `peak` at update number `warmup`, then down with the inverse square root of the updates taken.

    With t = count + 1, the number of the update: peak · min(t / warmup, √(warmup / t)). With `hold` it begins at `peak` and
    stays there for `warmup` updates: peak · √(warmup / max(t, warmup)).

    The Transformer's rate for a width d is `inverse_root((d * warmup) ** -0.5, warmup)`.
    Raises `ArgumentError` for a warm-up of fewer than one update, and for a peak that is not finite.

    Sources: Vaswani et al., "Attention is all you need", NeurIPS 2017; with `hold`, Raffel et al., "Exploring the limits of
    transfer learning with a unified text-to-text transformer", JMLR 2020.

    >>> inverse_root(1.0, 4)(torch.tensor([0, 1, 3, 15]))
    tensor([0.2500, 0.5000, 1.0000, 0.5000], dtype=torch.float64)
    >>> inverse_root(1.0, 4, hold=True)(torch.tensor([0, 1, 3, 15]))
    tensor([1.0000, 1.0000, 1.0000, 0.5000], dtype=torch.float64)
    """
    name = "hold" if hold else "warmup"

    def rule(count: Tensor, values: dict[str, Tensor]) -> Tensor:
        share = (count + 1) / values[name]
        fall = values["peak"] * torch.rsqrt(torch.clamp(share, min=1.0))
        return fall if hold else fall * torch.clamp(share, max=1.0)

    return Schedule("inverse_root", rule, {"peak": number("peak", peak), name: whole("warmup", warmup)})
