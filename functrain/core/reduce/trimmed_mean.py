"""The mean of the parts without the smallest and the largest, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.reduce.base import Reducer
from functrain.core.reduce.gathered import wide
from functrain.core.reduce.order import coordinatewise, ordered


def trimmed_mean(share: float) -> Reducer:
    """The trimmed mean over parts: without the b = ⌊share · K⌋ smallest and the b largest values of each coordinate.

    With g₍₁₎ ≤ … ≤ g₍K₎ the mean gradients of K parts at one coordinate, in order: Σ_{b < k ≤ K − b} g₍ₖ₎ / (K − 2b). Every
    part counts once, whatever its weight; loss and aux are weighted means over the parts whose loss is finite.

    It survives b corrupt parts: whatever they send, each coordinate stays within the range of the others' values there.
    The share is rounded down: to survive f of K parts, ask for f / K (or a little more); with fewer than 1 / share parts it is
    the plain mean of the parts, and survives none. A NaN counts as an extreme, half of them below and half above
    all others, so that they push the result to neither side; ±∞ are extremes on their own side. Where more is missing than is
    dropped, the result is NaN.

    Raises `ArgumentError` for a share outside [0, 0.5).

    Source: Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning: towards optimal statistical rates",
    ICML 2018.

    >>> import functrain as ft
    >>> robust = ft.parallel(ft.grad(lambda w, batch: batch @ w), 4, ft.reduce.trimmed_mean(0.25))
    >>> robust.finished(torch.zeros(2), torch.tensor([[1.0, -9.0], [2.0, 3.0], [3.0, 5.0], [torch.inf, 4.0]])).grads
    tensor([2.5000, 3.5000])
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 0.5:
        raise ArgumentError(
            f"trimmed_mean(share) needs a number in [0, 0.5), got {share!r}: the share of parts that is dropped at each end, "
            "so that f / K survives f corrupt parts of K; for the most that can be survived, see reduce.median"
        )

    def combine(values: Sequence[Tensor], odd: Tensor | None) -> Tensor:
        count = len(values)
        cut = dropped(share, count)
        if not cut:
            return _mean(wide(values)).to(values[0].dtype)
        if odd is None:
            return _mean(wide(ordered(values, cut, count - cut - 1))).to(values[0].dtype)
        before, *kept = wide(ordered(values, cut - 1, count - cut - 1))
        # One missing value more counts as an extreme of either end: the mean of both ways to count it.
        shift = 0.5 / len(kept) * before - 0.5 / len(kept) * kept[-1]
        return torch.where(odd, _mean(kept) + shift, _mean(kept)).to(values[0].dtype)

    return coordinatewise(f"trimmed_mean({share:g})", combine)


def dropped(share: float, count: int) -> int:
    """How many of `count` parts are dropped at each end: ⌊share · count⌋, at least one part being left.

    >>> dropped(0.29, 100), dropped(0.2, 4), dropped(0.25, 4)
    (29, 0, 1)
    """
    # 0.29 · 100 is 28.999… in floating point.
    return min(int(share * count + 1e-9), (count - 1) // 2)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) / len(values)
