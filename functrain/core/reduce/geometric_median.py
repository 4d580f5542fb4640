"""The geometric median of the parts: the point with the least sum of distances to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.reduce.base import Reducer
from functrain.core.reduce.gathered import gathered, inner_products, select
from functrain.core.tree import Tree


def geometric_median(*, steps: int = 16, smoothing: float = 1e-6) -> Reducer:
    """The geometric median argmin_z Σₖ wₖ ‖z − gₖ‖ of the mean gradients gₖ of K parts, each with its weight wₖ.

    Distances are over all leaves together. By a fixed number of steps of Weiszfeld's algorithm, smoothed by ν = `smoothing`:

        βₖ = wₖ / max(ν, ‖z − gₖ‖),    z ← Σₖ βₖ gₖ / Σₖ βₖ

    The first β takes for ‖z − gₖ‖ the weighted median of the distances from gₖ to all parts. The smoothing is in units of the
    gradient: distances below ν count as ν, and where all are, the result is the weighted mean. Each step reduces the error by
    a factor: 16 leave 10⁻⁹ of the spread of 8 parts in 100 dimensions; they are slow where the median is one of few parts, or
    nearly (4 parts in 2 dimensions: up to a tenth). In a compiled step 16 take 8 s to compile.

    Every z is a mean of the parts, so distances come from inner products between parts, O(K² P) for P parameters, and the
    steps are arithmetic on K × K numbers, float64: differences below 10⁻⁸ of the gradients' norms are lost in rounding.

    It survives less than half: if parts with a share α < ½ of all weight are corrupt, and the others' gradients are within
    r of some point, then the result is within 2 (1 − α) / (1 − 2α) · r of it, whatever the corrupt ones send. A part whose
    squared norm is not finite (or above 10³⁰⁰) has weight zero; with no other part the result is NaN. Loss and aux are
    weighted means over the parts whose loss is finite.

    Raises `ArgumentError` for less than one step, or a smoothing that is not above 0.

    Source: Pillutla, Kakade, Harchaoui, "Robust aggregation for federated learning", IEEE Transactions on Signal
    Processing 2022; the bound: Minsker, "Geometric median and robust estimation in Banach spaces", Bernoulli 2015.

    >>> import functrain as ft
    >>> robust = ft.parallel(ft.grad(lambda w, batch: batch @ w), 4, ft.reduce.geometric_median())
    >>> robust.finished(torch.zeros(2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])).grads
    tensor([0.5000, 0.5000])
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"geometric_median(steps=) needs an int of at least 1, got {steps!r}")
    if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 < smoothing < float("inf"):
        raise ArgumentError(
            f"geometric_median(smoothing=) needs a finite number above 0, got {smoothing!r}: the distance below which two "
            "gradients count as equal"
        )

    def combine(rows: Sequence[Tree], weights: Tensor) -> Tree:
        return select(rows, shares(inner_products(rows), weights, steps, smoothing))

    return gathered(f"geometric_median(steps={steps}, smoothing={smoothing:g})", combine, stacked=False, robust=True)


def shares(products: Tensor, weights: Tensor, steps: int, smoothing: float) -> Tensor:
    """The shares βₖ / Σ β of K parts in their geometric median: `(K,)`, of inner products `(K, K)` and weights `(K,)`.

    >>> shares(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), 8, 1e-6)
    tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
    """
    # Not by Tensor.diagonal: inductor (torch 2.13) warns of itself where it meets that.
    itself = torch.eye(len(products), dtype=torch.bool, device=products.device)
    squares = torch.where(itself, products, 0.0).sum(1)
    # Not merely finite: twice such a square has to be, too.
    finite = squares < 1e300
    products = torch.where(finite & finite.unsqueeze(1), products, 0.0)
    squares, weights = torch.where(finite, squares, 0.0), torch.where(finite, weights, 0.0)

    def pulls(squared: Tensor) -> Tensor:
        pull = weights * squared.clamp(min=smoothing**2).rsqrt()
        return pull / pull.sum()

    found = pulls(_median_squares(squares + squares.unsqueeze(1) - 2 * products, weights))
    for _ in range(steps):
        inner = products @ found
        found = pulls(squares - 2 * inner + (found * inner).sum())
    return found


def _median_squares(squared: Tensor, weights: Tensor) -> Tensor:
    """The weighted median of each row of squared distances.

    Where corrupt parts have less than half the weight it is no larger than the others' diameter for these, and for the corrupt
    ones it is a distance to one of the others: the algorithm starts among the good ones, however far off the corrupt are. From
    the mean it would take a step for every factor of K or so that they are off.
    """
    rows, order = squared.sort(dim=1)
    below = weights[order].cumsum(1) <= 0.5 * weights.sum()
    place = below.sum(1, keepdim=True).clamp(max=len(weights) - 1)
    return rows.gather(1, place).squeeze(1)
