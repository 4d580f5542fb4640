"""Arguments that count things, checked."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from functrain.core.errors import ArgumentError, PositionError

BOUND = 1 << 63


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
    # What counts something meets int64 sooner or later; a seed, which has no least, may be any int.
    if least is not None and number >= BOUND:
        raise ArgumentError(f"{name} must be below 2⁶³, got {number}")
    return number


def places(indices: Any, length: int) -> np.ndarray:
    """Positions that a caller gives to `take`, `(K,)`, as int64: a reader that trusts them would read beside its rows.

    Raises `ArgumentError` for what are no ints (bools are none), or none at all; `PositionError` outside 0 … length−1.

    >>> places(np.array([2, 0], dtype=np.uint8), 3)
    array([2, 0])
    """
    array = np.asarray(indices)
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size:
        raise ArgumentError(f"take reads elements at ints (K,), at least one, got {array.dtype} of shape {array.shape}")
    # Of int64, the usual case, one look tells: as unsigned numbers, those below 0 are the largest of all.
    if array.dtype != np.int64 or array.view(np.uint64).max() >= length:
        least, most = array.min(), array.max()
        if least < 0 or most >= length:
            place = least if least < 0 else most
            raise PositionError(f"position {place} lies outside a source of length {length}")
    return array.astype(np.int64, copy=False)


def before(epoch: int, length: int) -> int:
    """How many elements the epochs before this one have; `PositionError` where this one ends beyond what int64 counts."""
    if (epoch + 1) * length > BOUND:
        raise PositionError(f"epoch {epoch} of {length:,} elements ends beyond position 2⁶³, and no run comes that far")
    return epoch * length


def ranked(rank: Any, size: Any) -> tuple[int, int]:
    """A rank and how many there are; `ArgumentError` for a rank outside 0 … size−1."""
    size = integer("size", size, 1)
    rank = integer("rank", rank, 0)
    if rank >= size:
        raise ArgumentError(f"rank must lie in 0 … {size - 1}, got {rank} of size {size}")
    return rank, size
