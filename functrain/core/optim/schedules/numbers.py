"""The numbers of schedules: which are accepted, how one turns into another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float when it is a finite number in [low, high); else an `ArgumentError` that names it."""
    # Python's ints may be too large for a float.
    if not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e300 and low <= value < high:
        return float(value)
    within = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" in [{low:g}, {high:g})"
    advice = "; tensors go into the state, with ft.with_hyper" if isinstance(value, Tensor) else ""
    raise ArgumentError(f"{name} must be a finite number{within}, got {value!r}{advice}")


def whole(name: str, value: int) -> float:
    """`value` as a float when it is an int of at least 1; else an `ArgumentError` that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an int of at least 1, got {value!r}")
    return number(name, value)


def between(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """From `start` at a share of 0 to `end` at 1, exact at both."""
    return start * (1 - share) + end * share


def half_cosine(share: Tensor) -> Tensor:
    """From 0 at a share of 0 to 1 at 1, slow at both ends: ½ (1 − cos(π · share))."""
    return 0.5 * (1 - torch.cos(math.pi * share))
