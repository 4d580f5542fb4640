"""Clipping: gradients kept from being too large, element by element, all together, or unit by unit.

    clip            g ← max(−value, min(value, g))
    clip_by_norm    g ← g · min(1, norm / (‖g‖ + 10⁻⁶)),   ‖g‖ over all leaves together
    clip_adaptive   gᵢ ← gᵢ · min(1, ratio · max(‖pᵢ‖, ε) / ‖gᵢ‖),   i a unit

Sources: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, in the form of
torch.nn.utils; Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization", ICML 2021.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from functrain.core.optim.base import Hyper, Optimizer, checked, positive
from functrain.core.optim.part import part, wide, width


def clip(value: Hyper) -> Optimizer:
    """Every element clipped to [−value, value], as by torch.nn.utils.clip_grad_value_. NaN stays NaN.

    `value` is a number above 0 or a schedule (else `ArgumentError`).

    >>> part = clip(0.5)
    >>> params, grads = torch.zeros(3), torch.tensor([3.0, -0.25, -1.0])
    >>> part.update(grads, part.init(params), params)[0]
    tensor([ 0.5000, -0.2500, -0.5000])
    """

    def rule(grads: list[Tensor], params: list[Tensor], now: dict[str, Tensor]) -> list[Tensor]:
        bounds = [now["value"].to(width(leaf)) for leaf in grads]
        return [torch.clamp(wide(leaf), -bound, bound).to(leaf.dtype) for leaf, bound in zip(grads, bounds)]

    return part("clip", {"value": positive("value", value)}, rule)


def clip_by_norm(norm: Hyper) -> Optimizer:
    """Gradients scaled down together where they are longer than `norm`: numbers as from torch.nn.utils.clip_grad_norm_.

    The length is that of all leaves together, in float32 or better; gradients of length 0 stay as they are, also when this is
    differentiated. One NaN or infinity makes all NaN (`skip_nonfinite` around the optimizer passes over such a gradient); a
    finite gradient whose length overflows becomes 0, both as in torch. `norm` is a number above 0 or a schedule (else
    `ArgumentError`).

    >>> part = clip_by_norm(1.0)
    >>> params = {"w": torch.zeros(1), "b": torch.zeros(1)}
    >>> part.update({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, part.init(params), params)[0]
    {'w': tensor([0.6000]), 'b': tensor([0.8000])}
    """

    def rule(grads: list[Tensor], params: list[Tensor], now: dict[str, Tensor]) -> list[Tensor]:
        if not grads:
            return []
        squares = [_squares(leaf) for leaf in grads]
        widest = functools.reduce(torch.promote_types, (one.dtype for one in squares))
        length = _root(torch.stack([one.to(widest) for one in squares]).sum())
        factor = (now["norm"] / (length + 1e-6)).clamp(max=1.0)
        return [(wide(leaf) * factor.to(width(leaf))).to(leaf.dtype) for leaf in grads]

    return part("clip_by_norm", {"norm": positive("norm", norm)}, rule)


def clip_adaptive(ratio: Hyper = 0.01, *, eps: Hyper = 1e-3) -> Optimizer:
    """Each unit's gradient scaled down where it is longer than `ratio` times the unit's parameters.

    A unit is a row of a matrix, an output channel of a kernel (all but the first dimension), or the whole of a leaf of less
    than two dimensions. A unit shorter than `eps` counts as that long, so that zeros can be learned from. Lengths are in
    float32 or better. `ratio` is a number above 0, `eps` one of at least 0, or schedules (else `ArgumentError`). The paper
    leaves the last layer out: `masked(clip_adaptive(), where)`.

    >>> part = clip_adaptive(0.1)
    >>> params, grads = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[0.3, 0.4], [6.0, 8.0]])
    >>> part.update(grads, part.init(params), params)[0]
    tensor([[0.3000, 0.4000],
            [0.3000, 0.4000]])
    """

    def clipped(grad: Tensor, param: Tensor, now: dict[str, Tensor]) -> Tensor:
        ratio, eps = (now[name].to(width(grad)) for name in ("ratio", "eps"))
        units = tuple(range(1, grad.ndim))
        length = _root(_squares(grad, units))
        longest = ratio * torch.maximum(_root(_squares(param, units)).to(length.dtype), eps)
        too_long = length > longest
        return (wide(grad) * torch.where(too_long, longest / torch.where(too_long, length, 1.0), 1.0)).to(grad.dtype)

    def rule(grads: list[Tensor], params: list[Tensor], now: dict[str, Tensor]) -> list[Tensor]:
        return [clipped(grad, param, now) for grad, param in zip(grads, params)]

    return part("clip_adaptive", {"ratio": positive("ratio", ratio), "eps": checked("eps", eps)}, rule)


def _squares(leaf: Tensor, dims: tuple[int, ...] = ()) -> Tensor:
    """The sum of squares over `dims`, kept as dimensions of 1; over all, 0-d, when there are none."""
    return wide(leaf).square().sum(dims, keepdim=True) if dims else wide(leaf).square().sum()


def _root(squares: Tensor) -> Tensor:
    # With a derivative of 0 at 0: that of the root alone is infinite there, and 0 · ∞ is NaN.
    found = squares > 0
    return torch.where(found, torch.where(found, squares, 1.0).sqrt(), squares)
