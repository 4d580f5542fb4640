"""Updates that pass over gradients which are not finite.

    u, s ← update(g, s, p)   where all of g is finite,   u ← 0, s ← s   else

Source: optax's apply_if_finite, and the skipped steps of mixed-precision training (Micikevicius et al., ICLR 2018).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.health import all_finite
from functrain.core.optim.base import Optimizer, check_optimizers, check_state, leaves_of, started, updated, uses
from functrain.core.reduce.base import visible
from functrain.core.tree import Tree


class SkipState(NamedTuple):
    """The number of updates passed over, 0-d int64; the optimizer's state, under the label "optimizer"."""

    skipped: Tensor
    inner: dict[str, Any]


def skip_nonfinite(optimizer: Any) -> Optimizer:
    """The optimizer on finite gradients; where one holds a NaN or an infinity, nothing moves.

    The update is then zero, the optimizer's state (moments, its count, and with it its schedules) stays as it was, and the
    `skipped` of the state counts. `ft.guard(step)` puts back all that a bad step has touched, whatever made it bad, and cannot
    donate its old state; this looks at gradients alone, keeps carry and loss as they came, and works in place.

    Raises `ArgumentError` for what is no optimizer.

    >>> from functrain.core.optim import sgd
    >>> optimizer = skip_nonfinite(sgd(1.0))
    >>> params = torch.ones(2)
    >>> updates, state = optimizer.update(torch.tensor([1.0, torch.inf]), optimizer.init(params), params)
    >>> updates, state.skipped
    (tensor([0., 0.]), tensor(1))
    """
    check_optimizers("skip_nonfinite", {"what it is given": optimizer})

    def init(params: Tree) -> SkipState:
        return SkipState(started(params), {"optimizer": optimizer.init(params)})

    def finite(grads: Tree, state: SkipState, params: Tree) -> tuple[Tensor, SkipState]:
        check_state(state, SkipState)
        flat, spec = tree.flatten(params)
        good = all_finite(leaves_of(grads, params, spec, flat))
        return good, state._replace(skipped=state.skipped + (~good).to(torch.int64))

    def update(grads: Tree, state: SkipState, params: Tree, **extra: Tensor) -> tuple[Tree, SkipState]:
        good, counted = finite(grads, state, params)
        old = state.inner["optimizer"]
        if visible(good):
            if not good:
                return tree.map(torch.zeros_like, params), counted
            updates, new = updated(optimizer.update, optimizer, grads, old, params, extra)
            return updates, counted._replace(inner={"optimizer": new})
        # Zeros instead: what is computed of a NaN and not chosen would still make a derivative NaN.
        clean = tree.map(lambda leaf: torch.where(good, leaf, torch.zeros_like(leaf)), grads)
        updates, new = updated(optimizer.update, optimizer, clean, old, params, extra)
        updates = tree.map(lambda leaf: torch.where(good, leaf, torch.zeros_like(leaf)), updates)
        kept = tree.map(lambda leaf, was: leaf if leaf is was else torch.where(good, leaf, was), new, old)
        return updates, counted._replace(inner={"optimizer": kept})

    def fused(grads: Tree, state: SkipState, params: Tree, **extra: Tensor) -> tuple[Tree, SkipState]:
        good, counted = finite(grads, state, params)
        if not good:
            return params, counted
        params, new = updated(optimizer.fused, optimizer, grads, state.inner["optimizer"], params, extra)
        return params, counted._replace(inner={"optimizer": new})

    faster = None if getattr(optimizer, "fused", None) is None else fused
    return Optimizer(init, update, faster, "skip_nonfinite", {}, uses(optimizer), {"optimizer": optimizer})
