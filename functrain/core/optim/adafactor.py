"""Adafactor: second moments of matrices by their rows and columns alone, steps relative to the size of the params.

    β = 1 − t^beta2_decay,   ρ = min(lr, 1 / √t),   RMS(x) = √(mean x²)
    α = max(ε₂, RMS(p)) · ρ
    p ← p − lr · weight_decay · p
    r ← β r + (1 − β) · mean of g² over columns
    c ← β c + (1 − β) · mean of g² over rows
    v = r c / max(mean r, ε₁)                       leaves of two or more dimensions, by their last two
    v ← β v + (1 − β) g²                            vectors and scalars
    u = g / √max(v, ε₁²)
    p ← p − α · u / max(1, RMS(u) / d)

Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018; in the form of
torch.optim.Adafactor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number, choose, larger, root
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class AdafactorState(NamedTuple):
    """The number of updates taken t, the moments r, c and v (empty for leaves that have none), the hyperparameters."""

    steps: Tensor
    rows: Tree
    columns: Tree
    full: Tree
    hyper: dict[str, Any]


def adafactor(
    lr: Hyper = 1e-2,
    *,
    beta2_decay: Hyper = -0.8,
    eps1: Hyper | None = None,
    eps2: Hyper = 1e-3,
    d: Hyper = 1.0,
    weight_decay: Hyper = 0.0,
) -> Optimizer:
    """Adafactor: numbers as in torch.optim.Adafactor, whose `eps` are `eps1` and `eps2`.

    Every argument is a number or a schedule; `eps1=None` is the machine epsilon of float32, or of float64 for such leaves.
    A leaf `(…, M, N)` keeps r of `(…, M, 1)` and c of `(…, 1, N)`, so a kernel of convolution saves little: its last two
    dimensions are small.
    Raises `ArgumentError` for a negative number, a `beta2_decay` that is not below 0, and a `d` below 1.

    >>> optimizer = adafactor(0.1)
    >>> params = {"w": torch.ones(2, 2)}
    >>> updates, _ = optimizer.update({"w": torch.ones(2, 2)}, optimizer.init(params), params)
    >>> updates["w"]
    tensor([[-0.1000, -0.1000],
            [-0.1000, -0.1000]])
    """
    settings = {
        "lr": checked("lr", lr),
        "beta2_decay": checked("beta2_decay", beta2_decay, -math.inf, 0.0),
        "eps2": checked("eps2", eps2),
        "d": checked("d", d, 1.0),
        **({} if eps1 is None else {"eps1": checked("eps1", eps1)}),
        **decay_settings(weight_decay),
    }
    buffers = {"rows": _rows, "columns": _columns, "full": _full}
    return leafwise("adafactor", AdafactorState, settings, _numbers, _rule, buffers=buffers)


def _rows(leaf: Tensor) -> Tensor:
    return leaf.new_zeros((*leaf.shape[:-1], 1) if leaf.ndim > 1 else 0)


def _columns(leaf: Tensor) -> Tensor:
    return leaf.new_zeros((*leaf.shape[:-2], 1, leaf.shape[-1]) if leaf.ndim > 1 else 0)


def _full(leaf: Tensor) -> Tensor:
    return leaf.new_zeros(0) if leaf.ndim > 1 else torch.zeros_like(leaf)


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    most = 1 / root(count)
    return {**now, "fresh": count ** now["beta2_decay"], "rate": choose(now["lr"] < most, now["lr"], most)}, {}


def _rule(do: Arithmetic, p: Leaf, g: Leaf, rows: Leaf, columns: Leaf, full: Leaf, n: Numbers) -> tuple[Leaf, Leaf, Leaf]:
    rows = do.lerp_(rows, do.each(_factor(do, -1), rows, g), n["fresh"])
    columns = do.lerp_(columns, do.each(_factor(do, -2), columns, g), n["fresh"])
    full = do.lerp_(full, do.each(lambda v, g: v if g.ndim > 1 else g.square(), full, g), n["fresh"])
    eps = do.each(lambda leaf: n.get("eps1", torch.finfo(leaf.dtype).eps), p)
    estimate = do.each(_estimate, p, rows, columns, full, eps)
    # ε₁² of the paper's 10⁻³⁰ is 0 in float32.
    floor = do.each(lambda leaf, eps: larger(eps**2, torch.finfo(leaf.dtype).tiny), p, eps)
    u = do.mul_(do.rsqrt_(do.clamp_min_(estimate, floor)), g)
    size = do.each(lambda leaf, *norms: _size(leaf.numel(), norms, n), p, do.norm(p), do.norm(u))
    decayed(do, p, g, n, decoupled=True)
    do.descend_ratio(u, size, n["rate"])
    return rows, columns, full


def _factor(do: Arithmetic, dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    # Where a leaf has no such factor, or nothing to average, the moment moves towards itself.
    return lambda moment, g: do.mean_square(g, dim) if g.ndim > 1 and g.numel() else moment


def _estimate(p: Tensor, rows: Tensor, columns: Tensor, full: Tensor, eps: Number) -> Tensor:
    if p.ndim < 2:
        return full.clone()
    mean = rows.mean(-2, keepdim=True)
    return rows / larger(mean, eps) * columns


def _size(count: int, norms: Sequence[Tensor], n: Numbers) -> Tensor:
    """What u is divided by: max(1, RMS(u) / d) / max(ε₂, RMS(p))."""
    of_p, of_u = (norm / max(count, 1) ** 0.5 for norm in norms)
    return larger(of_u / n["d"], 1.0) / larger(of_p, n["eps2"])
