"""Arguments that count things, checked."""

from __future__ import annotations

import operator
from typing import Any

from functrain.core.errors import ArgumentError


def integer(name: str, value: Any, least: int | None = None) -> int:
    """The argument `name` as an int; `ArgumentError` where it is none, or less than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ArgumentError(f"{name} must be an int, got {value!r}")
    if least is not None and number < least:
        raise ArgumentError(f"{name} must be at least {least}, got {number}")
    return number


def ranked(rank: Any, size: Any) -> tuple[int, int]:
    """A rank and how many there are; `ArgumentError` for a rank outside 0 … size−1."""
    size = integer("size", size, 1)
    rank = integer("rank", rank, 0)
    if rank >= size:
        raise ArgumentError(f"rank must lie in 0 … {size - 1}, got {rank} of size {size}")
    return rank, size
