"""The gradient noise scale, measured beside any reducer: how far the parts' gradients scatter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, LossError
from functrain.core.reduce.base import Gradient, Reducer, add, squared_norm
from functrain.core.reduce.gathered import inner_products
from functrain.core.tree import Tree


class Scatter(NamedTuple):
    """What is kept of parts: the reducer's own (`inner`), Σ gradients and Σ weight, Σₖ wₖ ‖gₖ − g‖², the number of parts.

    The scatter is as precise as the gradients are, float32 or float64; what is summed for it is summed in float64.
    """

    inner: Any
    grads: Tree
    weight: Tensor
    squares: Tensor
    parts: Tensor


def with_noise_scale(reducer: Reducer) -> Reducer:
    """`reducer`, which also reports how much the gradients of single examples scatter.

    Grads, loss and weight are what `reducer` gives over the same parts, bit for bit. `aux`, and so a step's metrics, gets three
    more measures, 0-d, of the loss's dtype (at least float32). With S the sum of all gradients, sₖ that of part k of K,
    W and wₖ their weights:

    - `gradient_variance`: the trace of the covariance of one example's gradient, estimated without bias from the parts,
      tr Σ = (Σₖ ‖sₖ‖²/wₖ − ‖S‖²/W) / (K − 1);
    - `noise_scale`: the simple noise scale tr Σ / ‖G‖², with ‖G‖² = ‖S/W‖² − tr Σ/W: near this batch size, twice the batch
      stops being worth nearly two steps. Where the estimate of ‖G‖² is not positive, the noise drowns the gradient: inf;
    - `gradient_norm`: ‖S/W‖.

    One part has no variance: with K = 1 the first two are NaN, in the metrics too; so is all where a gradient holds a NaN.
    The noise scale of one batch is noisy: average tr Σ and ‖G‖² over steps, and divide then. Each loss is taken as an example
    by itself, whose gradient has the covariance Σ / w if it has the weight w. Parts whose weights sum to zero are not counted.

    A dict of the user's measures is extended; any other aux becomes `{"aux": aux, …}`. The plan is never `fused`, as the
    parts have to be seen. One gradient more is alive for each that `reducer` keeps.

    Raises `ArgumentError` for a reducer of single examples (`clip_per_example`, `private`: no part shows them its plain
    gradient), `LossError` where the user has a measure of one of these names.

    Source: McCandlish, Kaplan, Amodei et al., "An empirical model of large-batch training", 2018, appendix A; merged as in
    Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 1983.

    >>> import functrain as ft
    >>> told = ft.parallel(ft.grad(lambda w, batch: batch * w), 4, ft.reduce.with_noise_scale(ft.reduce.mean))
    >>> told.finished(torch.tensor(0.0), torch.tensor([1.0, 2.0, 4.0, 9.0])).aux["gradient_variance"]
    tensor(12.6667)
    """
    if not isinstance(reducer, Reducer):
        raise ArgumentError(f"with_noise_scale takes a reducer such as ft.reduce.mean, got {reducer!r}")
    if reducer.scale is not None:
        raise ArgumentError(
            f"with_noise_scale cannot measure under {reducer!r}: it scales the gradient of every single example, so no part "
            "has a plain gradient to compare; measure beside another reducer, such as ft.reduce.mean"
        )

    def lift(gradient: Gradient) -> Scatter:
        weight = gradient.weight.double()
        parts = (weight != 0).to(weight.dtype)
        squares = torch.zeros_like(gradient.loss, dtype=torch.promote_types(gradient.loss.dtype, torch.float32))
        return Scatter(reducer.lift(gradient), gradient.grads, weight, squares, parts)

    def merge(left: Scatter, right: Scatter) -> Scatter:
        inner = reducer.merge(left.inner, right.inner)
        squares = (left.squares.double() + right.squares + _between(left, right)).to(left.squares.dtype)
        grads = add(left.grads, right.grads)
        return Scatter(inner, grads, left.weight + right.weight, squares, left.parts + right.parts)

    def finish(merged: Scatter, *key: Tensor) -> Gradient:
        done = reducer.finish(merged.inner, *key)
        return done._replace(aux=_beside(done.aux, _measures(merged)))

    name = f"with_noise_scale({reducer.name})"
    return Reducer(name, merge, finish, lift, keyed=reducer.keyed, copies=reducer.copies + 1, gathers=reducer.gathers)


def _between(left: Scatter, right: Scatter) -> Tensor:
    """What two groups scatter more than each by itself: ‖g₁ − g₂‖² w₁w₂ / (w₁ + w₂).

    Of each merge, not Σₖ ‖sₖ‖²/wₖ − ‖S‖²/W at the end: the rounding of a float32 S would drown what scatters little.
    """
    shares = torch.stack([1 / _safe(left.weight), -1 / _safe(right.weight)])
    apart = shares @ inner_products([left.grads, right.grads]) @ shares
    # In float64 a difference of equals may come out below zero, by its last digit; NaN stays.
    return apart.clamp_min(0) * (left.weight * right.weight / _safe(left.weight + right.weight))


def _safe(weight: Tensor) -> Tensor:
    return torch.where(weight != 0, weight, torch.ones_like(weight))


def _measures(merged: Scatter) -> dict[str, Tensor]:
    square = squared_norm(merged.grads) / merged.weight.square()
    # 0 / 0 with one part: NaN, as is all that follows from it.
    variance = merged.squares.double() / (merged.parts - 1)
    signal = square - variance / merged.weight
    scale = torch.where(signal <= 0, torch.full_like(signal, torch.inf), variance / signal)
    found = {"gradient_norm": square.sqrt(), "gradient_variance": variance, "noise_scale": scale}
    return {name: value.to(merged.squares.dtype) for name, value in found.items()}


def _beside(aux: Tree, measures: dict[str, Tensor]) -> dict[str, Any]:
    own = aux if isinstance(aux, dict) else {} if aux is None else {"aux": aux}
    taken = [repr(name) for name in measures if name in own]
    if taken:
        raise LossError(f"with_noise_scale reports {', '.join(taken)}, and the loss has an aux of that name: rename the loss's")
    return {**own, **measures}
