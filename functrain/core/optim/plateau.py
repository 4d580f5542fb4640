"""On a plateau: updates become smaller when the loss stops getting better.

    better: loss < best · (1 − threshold)       ("rel"), or loss < best − threshold       ("abs"), for mode "min";
            loss > best · (1 + threshold)       ("rel"), or loss > best + threshold       ("abs"), for mode "max"
    bad ← 0 where better, else bad + 1;   while the cooldown lasts it is one less, and bad ← 0
    where bad > patience:  scale ← max(scale · factor, min_scale),  cooldown starts,  bad ← 0

Source: torch.optim.lr_scheduler.ReduceLROnPlateau, whose semantics and names these are, with a scale in the place of the rate.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.optim.base import (
    Hyper,
    Optimizer,
    Settings,
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

Mode = Literal["min", "max"]
ThresholdMode = Literal["rel", "abs"]


class PlateauState(NamedTuple):
    """What has been seen of the loss, and the scale that follows from it.

    `steps`: updates taken; `scale`: what updates are multiplied with; `best`, `bad`, `resting`: the best loss, how many were
    not better since, and how many are left of the cooldown; `total`: the losses added up since the last mean. All 0-d.
    """

    steps: Tensor
    scale: Tensor
    best: Tensor
    bad: Tensor
    resting: Tensor
    total: Tensor
    hyper: dict[str, Any]
    inner: dict[str, Any]


def plateau(
    optimizer: Any,
    factor: Hyper = 0.1,
    patience: int = 10,
    *,
    every: int = 1,
    mode: Mode = "min",
    threshold: Hyper = 1e-4,
    threshold_mode: ThresholdMode = "rel",
    cooldown: int = 0,
    min_scale: Hyper = 0.0,
    eps: Hyper = 1e-8,
) -> Optimizer:
    """The optimizer, its updates scaled down by `factor` when the loss has not got better for more than `patience` looks.

    A look is at the mean of the losses of `every` updates: of an epoch's number of batches, say. The loss is that of the params
    before the update, as a step hands it in, and its scale is that of the updates after it, as with a scheduler that is stepped
    after the optimizer. Options are those of torch.optim.lr_scheduler.ReduceLROnPlateau, with two of them in units of the
    scale, which is 1 at first: `min_scale` for `min_lr`, and `eps`, the least change that is made. What is scaled is the whole
    update, weight decay included. A step's metrics show `scale`, that of the next update.

    Raises `ArgumentError` for a factor outside [0, 1), negative numbers, other modes, counts that are not
    whole, and `every` below 1.

    >>> from functrain.core.optim import sgd
    >>> optimizer = plateau(sgd(1.0), factor=0.5, patience=0)
    >>> params = torch.ones(1)
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...     updates, state = optimizer.update(torch.ones(1), state, params, loss=torch.tensor(2.0))
    >>> updates, state.scale
    (tensor([-0.5000]), tensor(0.2500, dtype=torch.float64))
    """
    check_optimizers("plateau", {"what it is given": optimizer})
    period = counted("every", every)
    if mode not in get_args(Mode) or threshold_mode not in get_args(ThresholdMode):
        raise ArgumentError(f"mode is 'min' or 'max', threshold_mode 'rel' or 'abs'; got {mode!r} and {threshold_mode!r}")
    settings: Settings = {
        "factor": checked("factor", factor, 0.0, 1.0),
        "patience": counted("patience", patience, 0),
        "threshold": checked("threshold", threshold),
        "cooldown": counted("cooldown", cooldown, 0),
        "min_scale": checked("min_scale", min_scale),
        "eps": checked("eps", eps),
    }
    sign = 1.0 if mode == "min" else -1.0
    start: Settings = {"scale": 1.0, "best": sign * math.inf, "bad": 0.0, "resting": 0.0, "total": 0.0}

    def init(params: Tree) -> PlateauState:
        count, running, given = started(params), place(start, params), place(settings, params)
        return PlateauState(count, **running, hyper=given, inner={"optimizer": optimizer.init(params)})

    def better(loss: Tensor, best: Tensor, threshold: Tensor) -> Tensor:
        bound = best * (1.0 - sign * threshold) if threshold_mode == "rel" else best - sign * threshold
        return loss < bound if mode == "min" else loss > bound

    def looked(state: PlateauState, loss: Tensor, now: dict[str, Tensor]) -> PlateauState:
        """The state after a look at a loss."""
        good = better(loss, state.best, now["threshold"])
        # Counts differ by whole numbers: halfway between them, where a small change of patience or cooldown changes nothing.
        cooling = state.resting > 0.5
        bad = torch.where(good | cooling, 0.0, state.bad + 1.0)
        resting = torch.where(cooling, state.resting - 1.0, state.resting)
        enough = bad > now["patience"] + 0.5
        smaller = torch.maximum(state.scale * now["factor"], now["min_scale"])
        lower = enough & (state.scale - smaller > now["eps"])
        return state._replace(
            scale=torch.where(lower, smaller, state.scale),
            best=torch.where(good, loss, state.best),
            bad=torch.where(enough, 0.0, bad),
            resting=torch.where(enough, now["cooldown"], resting),
            total=torch.zeros_like(state.total),
        )

    def after(state: PlateauState, loss: Tensor, inner: Any) -> PlateauState:
        # Comparisons have no derivative; the best loss would keep its graph alive for as long as it is the best.
        total = state.total + loss.detach().to(state.total.dtype)
        new = looked(state, total / period, resolve(settings, state.hyper, state.steps))
        waiting = state._replace(total=total)
        if period > 1:
            due = (state.steps + 1) % period == 0
            new = tree.map(lambda leaf, was: leaf if leaf is was else torch.where(due, leaf, was), new, waiting)
        return new._replace(steps=state.steps + 1, inner={"optimizer": inner})

    def update(grads: Tree, state: PlateauState, params: Tree, *, loss: Tensor, **extra: Tensor) -> tuple[Tree, PlateauState]:
        check_state(state, PlateauState)
        given = {**extra, "loss": loss}
        updates, inner = updated(optimizer.update, optimizer, grads, state.inner["optimizer"], params, given)
        scaled = tree.map(lambda leaf: (wide(leaf) * state.scale.to(width(leaf))).to(leaf.dtype), updates)
        return scaled, after(state, loss, inner)

    def fused(grads: Tree, state: PlateauState, params: Tree, *, loss: Tensor, **extra: Tensor) -> tuple[Tree, PlateauState]:
        check_state(state, PlateauState)
        given, scale = {**extra, "loss": loss}, state.scale.item()
        before = tree.leaves(tree.map(torch.clone, params)) if scale != 1.0 else []
        params, inner = updated(optimizer.fused, optimizer, grads, state.inner["optimizer"], params, given)
        if before:
            torch._foreach_lerp_(tree.leaves(params), before, 1.0 - scale)
        return params, after(state, loss, inner)

    faster = None if getattr(optimizer, "fused", None) is None else fused
    options: dict[str, Any] = {**settings, "every": period, "mode": mode, "threshold_mode": threshold_mode}
    used = uses(optimizer) | {"loss"}
    return Optimizer(init, update, faster, "plateau", options, used, {"optimizer": optimizer}, ("scale",))
