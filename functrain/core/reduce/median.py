"""The median of the parts, coordinate by coordinate.

With gₖ the mean gradient of part k of K, at each coordinate: the middle one of g₁ … g_K, or for even K the mean of the two in
the middle. Every part counts once, whatever its weight; loss and aux are weighted means over the parts whose loss is finite.

It survives fewer than half: with at most ⌊(K − 1) / 2⌋ corrupt parts, whatever they send, each coordinate stays within the
range of the others' values there. A NaN is no value: at its coordinate the median is that of the other parts (±∞ are
values). Where that is not finite, the result is NaN.

Source: Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018.

>>> import functrain as ft
>>> robust = ft.parallel(ft.grad(lambda w, batch: batch @ w), 3, ft.reduce.median)
>>> robust.finished(torch.zeros(2), torch.tensor([[1.0, -5.0], [2.0, 3.0], [torch.inf, 4.0]])).grads
tensor([2., 3.])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core.reduce.order import coordinatewise, ordered


def combine(values: Sequence[Tensor], odd: Tensor | None) -> Tensor:
    """The median of K tensors `(P,)`, elementwise; `odd`, and the extremes that it speaks of: see `coordinatewise`."""
    count = len(values)
    low, high = max(0, count // 2 - 1), count // 2
    if odd is None:
        (*below, middle) = ordered(values, high if count % 2 else low, high)
        return _between(below[0], middle) if below else middle
    *below, middle = ordered(values, low, high)
    lower = below[0] if below else middle
    # One value more at the upper end moves the middle by half a rank: from one value to two, or from two to one.
    return torch.where(odd == bool(count % 2), _between(lower, middle), middle if count % 2 else lower)


def _between(a: Tensor, b: Tensor) -> Tensor:
    # Halved before adding: the sum of two large numbers of half precision is not finite.
    return 0.5 * a + 0.5 * b


median = coordinatewise("median", combine)
