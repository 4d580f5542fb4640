"""Lookahead: an optimizer runs ahead, and slow weights follow part of the way every few updates.

    p ← p + u                                          every update, u the optimizer's
    φ ← φ + share · (p − φ),   p ← φ                   every `every` updates

Source: Zhang, Lucas, Hinton, Ba, "Lookahead optimizer: k steps forward, 1 step back", NeurIPS 2019.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.optim.base import (
    Hyper,
    Optimizer,
    check_optimizers,
    check_state,
    checked,
    counted,
    started,
    updated,
    uses,
)
from functrain.core.optim.hyper import place, resolve
from functrain.core.optim.part import wide, width
from functrain.core.tree import Tree


class LookaheadState(NamedTuple):
    """The number of updates taken, the slow weights φ, the hyperparameters; the optimizer's state, as "optimizer"."""

    steps: Tensor
    slow: Tree
    hyper: dict[str, Any]
    inner: dict[str, Any]


def lookahead(optimizer: Any, every: int = 6, share: Hyper = 0.5) -> Optimizer:
    """The optimizer, whose params every `every` updates go back to slow weights that have come `share` of the way.

    The slow weights start at the params; the optimizer's own state (momentum) goes on as it is. Evaluate right after a
    multiple of `every` updates, or with `state.opt.slow`: in between the params run ahead.

    `share` is a number in [0, 1) or a schedule, `every` a whole number of at least 1 (else `ArgumentError`).

    >>> from functrain.core.optim import sgd
    >>> optimizer = lookahead(sgd(1.0), every=2)
    >>> params = torch.tensor([8.0])
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(torch.ones(1), state, params)
    ...     params = params + updates
    >>> params, state.slow
    (tensor([7.]), tensor([7.]))
    """
    check_optimizers("lookahead", {"what it is given": optimizer})
    settings = {"share": checked("share", share, 0.0, 1.0)}
    period = counted("every", every)

    def init(params: Tree) -> LookaheadState:
        count, slow = started(params), tree.map(torch.clone, params)
        return LookaheadState(count, slow, place(settings, params), {"optimizer": optimizer.init(params)})

    def ran(way: Any, grads: Tree, state: LookaheadState, params: Tree, extra: Any) -> tuple[Tree, LookaheadState, Tensor]:
        """What one way of the optimizer gives, and the share of the way that slow weights go."""
        check_state(state, LookaheadState)
        found, inner = updated(way, optimizer, grads, state.inner["optimizer"], params, extra)
        new = state._replace(steps=state.steps + 1, inner={"optimizer": inner})
        return found, new, resolve(settings, state.hyper, state.steps)["share"]

    def update(grads: Tree, state: LookaheadState, params: Tree, **extra: Tensor) -> tuple[Tree, LookaheadState]:
        updates, new, part = ran(optimizer.update, grads, state, params, extra)
        due = new.steps % period == 0

        def back(param: Tensor, moved: Tensor, slow: Tensor) -> tuple[Tensor, Tensor]:
            met = (wide(slow) + part.to(width(slow)) * (wide(param + moved) - wide(slow))).to(slow.dtype)
            return torch.where(due, met - param, moved), torch.where(due, met, slow)

        flat, spec = tree.flatten(params)
        columns = (tree.leaves_like(spec, one, params) for one in (updates, state.slow))
        rows = [back(*row) for row in zip(flat, *columns)]
        changed, slow = ([row[column] for row in rows] for column in (0, 1))
        return tree.unflatten(spec, changed), new._replace(slow=tree.unflatten(spec, slow))

    def fused(grads: Tree, state: LookaheadState, params: Tree, **extra: Tensor) -> tuple[Tree, LookaheadState]:
        params, new, part = ran(optimizer.fused, grads, state, params, extra)
        flat, spec = tree.flatten(params)
        if flat and new.steps.item() % period == 0:
            slow = tree.leaves_like(spec, state.slow, params)
            torch._foreach_lerp_(slow, flat, part.item())
            torch._foreach_copy_(flat, slow)
        return params, new

    faster = None if getattr(optimizer, "fused", None) is None else fused
    options = {**settings, "every": period}
    return Optimizer(init, update, faster, "lookahead", options, uses(optimizer), {"optimizer": optimizer})
