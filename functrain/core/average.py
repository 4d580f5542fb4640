"""Averages of the params of a run: exponential moving, or uniform."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.around import check_inner, check_single, opened
from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage, explain
from functrain.core.optim.base import Hyper, Schedule, checked
from functrain.core.optim.hyper import place, resolve
from functrain.core.reduce.base import visible
from functrain.core.step import Metrics, Step, check_owned
from functrain.core.tree import Tree


class Averaged(NamedTuple):
    """The inner step's optimizer state, and beside it

    - `average`: the averaged params, at least float32; `carry`: the averaged carry, or None;
    - `taken`: how many params it was taken of: 0-d int64; `weight`: what they weigh together: 0-d float64;
    - `hyper`: the decay of a moving average.
    """

    inner: Any
    average: Tree
    carry: Tree
    taken: Tensor
    weight: Tensor
    hyper: dict[str, Any]


def averaged(step: Step, decay: Hyper | None = 0.999, *, start: int = 0, every: int = 1, carry: bool = False) -> Step:
    """The same step, whose state also keeps an average of the params: `ft.average(state)`.

    With pₜ the t-th params that are averaged, t = 1, 2, …, and d the decay (a number or a schedule of t − 1),

        wₜ = d wₜ₋₁ + (1 − d),    aₜ = aₜ₋₁ + (1 − d) / wₜ · (pₜ − aₜ₋₁),    w₀ = 0,

    an exponential moving average without bias: of a constant d, wₜ = 1 − dᵗ, and early averages are nearly uniform instead of
    being dominated by where they began. With `decay=None` it is the uniform average, aₜ = (p₁ + … + pₜ) / t.

    - `start`, `every`: averaged are the params of positions `start`, `start` + `every`, … (a position counts the steps taken;
      the initial params, position 0, are not averaged). Before the first, the average is the params themselves;
    - `carry`: whether the carry (batch norm's running statistics) is averaged, too; its integers are the latest. By default
      it is not: the last one belongs to params that are not the averaged ones. Better than either is one pass over
      the training data at the averaged params: `for batch in source: _, carry = loss(params, batch, carry=carry)`.

    Params of half precision are averaged in float32. A schedule's present decay is among the metrics. The average is part
    of the state: saved, resumed, vmapped, and left as it was where a guard around this step skips a batch.

    Raises `ArgumentError` for a decay outside [0, 1), a start below 0, an `every` below 1, or a step that donates.

    Sources: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Izmailov et al., "Averaging
    weights leads to wider optima and better generalization", UAI 2018; the correction is that of Adam's moments (Kingma and
    Ba, ICLR 2015). torch.optim.swa_utils.AveragedModel has none: it is a schedule whose decay at t = 1 is 0.

    >>> import functrain as ft
    >>> train = ft.averaged(ft.step(ft.grad(lambda p, batch: batch * p), ft.optim.sgd(1.0)), decay=0.5)
    >>> state = train.init(torch.tensor(0.0))
    >>> for _ in range(2):
    ...     state, _ = train(state, torch.ones(1))
    >>> state.params, ft.average(state)  # (0.5 · −1 + −2) / 1.5
    (tensor(-2.), tensor(-1.6667))
    """
    check_inner(step, "averaged")
    settings: dict[str, Hyper] = {} if decay is None else {"decay": checked("decay", decay, 0.0, 1.0)}
    _check_count("start", start, 0)
    _check_count("every", every, 1)
    if not isinstance(carry, bool):
        raise ArgumentError(f"carry says whether the carry is averaged, True or False, got {carry!r}")

    def init(params: Tree, **given: Any) -> Any:
        state = step.init(params, **given)
        check_single(state, "averaged")
        if carry and state.carry is None:
            raise ArgumentError("carry=True averages the carry, and there is none: give it to init, or leave carry=True out")
        mine, threaded = tree.map(_begun, (state.params, state.carry if carry else None))
        weight = torch.zeros((), dtype=_real(state.position), device=state.position.device)
        own = Averaged(state.opt, mine, threaded, torch.zeros_like(state.position), weight, place(settings, state.params))
        return state._replace(opt=own)

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        own = opened(state, Averaged, "averaged")
        new, metrics = step.update(state._replace(opt=own.inner), batch)
        now = resolve(settings, own.hyper, own.taken)
        if isinstance(decay, Schedule):
            metrics = {**metrics, **{f"average.{name}" if name in metrics else name: value for name, value in now.items()}}
        due = None if start == 0 and every == 1 else _due(state.position, new.position, start, every)
        return new._replace(opt=_advanced(own, new, now.get("decay"), due)), metrics

    def stage() -> Stage:
        facts = {"average": "uniform" if decay is None else f"exponential moving, decay {decay!r}, without bias"}
        facts["of"] = "params and carry" if carry else "params"
        if due := [f"from position {start} on"] * (start > 0) + [f"each {every} positions"] * (every > 1):
            facts["when"] = ", ".join(due)
        return Stage("averaged", facts, [explain(step)])

    def remake(grad: Any) -> Step:
        return averaged(step.remade(grad), decay, start=start, every=every, carry=carry)

    return Step(init, update, stage, grad=step.grad, remake=remake, takes=step.takes)


def average(state: Any, of: Literal["params", "carry"] = "params") -> Tree:
    """The averaged params in a state of `ft.averaged(step)`, whatever steps are around it, in the params' dtypes.

    With `of="carry"` the carry, of `ft.averaged(step, carry=True)`. Of averages around averages it is the outer one:
    `ft.average(state._replace(opt=state.opt.inner))` is the next. The tensors are the state's: a donating step takes them.

    Raises `ArgumentError` where there is no average in the state.

    >>> import functrain as ft
    >>> train = ft.guard(ft.averaged(ft.step(ft.grad(lambda p, batch: batch * p["w"]), ft.optim.sgd(1.0))))
    >>> average(train.init({"w": torch.tensor(3.0)}))
    {'w': tensor(3.)}
    """
    check_owned(state)
    if of not in ("params", "carry"):
        raise ArgumentError(f"an average is of the 'params' or the 'carry', got {of!r}")
    own = state.opt
    while own is not None and not isinstance(own, Averaged):
        own = getattr(own, "inner", None)
    if own is None:
        raise ArgumentError(
            f"there is no average in this state, whose opt is {type(state.opt).__name__}: make the step with "
            "ft.averaged(ft.step(grad, optimizer), decay=0.999), and the state with its init"
        )
    if of == "carry" and own.carry is None:
        raise ArgumentError("this state averages params alone: make the step with ft.averaged(step, carry=True)")
    found, like = (own.average, state.params) if of == "params" else (own.carry, state.carry)
    return tree.map(lambda leaf, now: leaf.to(now.dtype), found, like)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"averaged: {name} must be an int of at least {least}, a number of positions, got {value!r}")


def _real(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _begun(leaf: Tensor) -> Tensor:
    # In bfloat16, a share of 0.001 of most differences would be lost in rounding: the average would stand still.
    dtype = torch.promote_types(leaf.dtype, torch.float32) if leaf.is_floating_point() else leaf.dtype
    return leaf.to(dtype, copy=True)


def _due(before: Tensor, after: Tensor, start: int, every: int) -> Tensor:
    """Whether a step has reached a position whose params are averaged, or passed one: 0-d bool."""
    reached, was = (torch.div(position - start, every, rounding_mode="floor") for position in (after, before))
    return (reached > was) & (after >= start)


def _advanced(own: Averaged, new: Any, decay: Tensor | None, due: Tensor | None) -> Averaged:
    """What is kept after a step: with the new params in the average if it is their turn, always for None."""
    keep, gain = (1.0, torch.ones_like(own.weight)) if decay is None else (decay, 1 - decay)
    weight = keep * own.weight + gain
    share, taken, hold = gain / weight, own.taken + 1, None
    if due is not None:
        fresh = own.taken == 0
        share = torch.where(fresh, 1.0, share)
        weight, taken = torch.where(due, weight, own.weight), torch.where(due, taken, own.taken)
        hold = ~(due | fresh)
        if visible(hold) and hold:
            return own._replace(inner=new.opt)

    def moved(leaf: Tensor, latest: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            # Not the carry's own tensor: the state would hold it twice.
            return latest.clone()
        towards = torch.lerp(leaf, latest.to(leaf.dtype), share.to(leaf.dtype))
        return towards if hold is None else torch.where(hold, leaf, towards)

    carry = None if own.carry is None else tree.map(moved, own.carry, new.carry)
    return Averaged(new.opt, tree.map(moved, own.average, new.params), carry, taken, weight, own.hyper)
