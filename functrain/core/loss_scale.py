"""Dynamic loss scaling: gradients of float16 that neither underflow nor stay infinite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import loss as losses
from functrain.core import tree
from functrain.core.around import check_inner, opened
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.grad import Grad, as_gradient, remade
from functrain.core.guard import chosen
from functrain.core.health import all_finite
from functrain.core.reduce.base import Gradient, divided
from functrain.core.step import Metrics, Step
from functrain.core.tree import Tree


class Scaled(NamedTuple):
    """The inner step's optimizer state, the loss scale (0-d float32), the good steps since it last changed (0-d int64)."""

    inner: Any
    scale: Tensor
    good: Tensor


def loss_scaled(step: Step, *, initial: float = 2.0**15, factor: float = 2.0, patience: int = 2000, least: float = 1.0) -> Step:
    """The same step, whose loss is multiplied by a scale where it is differentiated, and its gradients divided by it.

    In float16 small gradients become 0 on their way back through the network; times the scale S they do not. What comes out
    of the innermost gradient is ∇(S · loss) / S, divided in the params' dtype, so that reducers, clipping and the optimizer
    see plain gradients. The scale adapts:

    - where a gradient (of any part of the batch) is not finite, params, optimizer state and carry stay as they were, the
      position advances, and S ← max(`least`, S / `factor`);
    - after `patience` good steps one after the other, S ← S · `factor`, as long as that is finite.

    Metrics are the inner step's, the loss without scale, and beside them `scale`, that of this step, and `skipped`, 1.0 or 0.0
    (a measure of the user's called `scale` is `aux.scale`). Steps around it take it like any other; windows or steps that
    are inside, `ft.loss_scaled(ft.tbptt(step, …))`, share one scale and count as one. Gradients of single examples are taken by
    vmap. Compiled, what is fused is not rounded to float16 in between and overflows less often. bfloat16 has the range of
    float32 and needs none of this.

    Raises `ArgumentError` for a step that donates, is compiled, or has no `ft.grad(loss)` at its heart, and for numbers out of
    range; `TreeError` at `init` for float16 params, in which divided gradients would underflow once more: `ft.mixed` casts
    float32 ones.

    Sources: Micikevicius et al., "Mixed precision training", ICLR 2018; in the form of torch.amp.GradScaler and of
    jmp.DynamicLossScale.

    >>> import functrain as ft
    >>> half = ft.mixed(lambda params, batch: batch * (params * 1e-5) * 1e-5, "compute=float16")
    >>> plain = ft.step(ft.grad(half), ft.optim.sgd(1e9))
    >>> batch, start = torch.ones(1), torch.tensor(0.0)
    >>> step = ft.loss_scaled(plain)
    >>> plain(plain.init(start), batch)[0].params, step(step.init(start), batch)[0].params.round(decimals=2)
    (tensor(0.), tensor(-0.1000))
    """
    check_inner(step, "loss_scaled")
    if step.grad is None or step.remake is None:
        raise ArgumentError(
            f"loss_scaled scales the loss inside of a step's gradient, and this step ({explain(step).title}) is not made of "
            "one: put it around the ft.step(grad, optimizer) inside; or, for players of a game, compute in bfloat16"
        )
    if explain(step).has("loss_scaled"):
        raise ArgumentError("the loss of this step is scaled already: ft.loss_scaled goes around it once")
    if explain(step).has("compiled"):
        outside = "ft.compiled(ft.loss_scaled(step))"
        raise ArgumentError(f"the scale would be a constant of a compiled step: compile outside, {outside}")
    _check_numbers(initial, factor, patience, least)
    heart = remade(as_gradient(step.grad), _Unscaling, "ft.loss_scaled multiplies that loss, so scale inside of it")
    whole = isinstance(step.grad, Grad) or getattr(step.grad, "whole", False)
    latest: list[Step] = []

    def init(params: Tree, *, carry: Tree = None, seed: int | Tensor = 0) -> Any:
        _check_params(params)
        state = step.init(params, carry=carry, seed=seed)
        scale = torch.full((), initial, dtype=torch.float32, device=state.position.device)
        return state._replace(opt=Scaled(state.opt, scale, torch.zeros_like(state.position)))

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        own = opened(state, Scaled, "loss_scaled")
        inside = state._replace(opt=own.inner)
        inner = step.remade(_AtScale(heart, own.scale, whole))
        new, metrics = inner.update(inside, batch)
        # With it, the memory of its gradients is kept until the next step, as a step does by itself.
        latest[:] = [inner]
        good = ~(metrics[_OVERFLOW] > 0).any()
        new = chosen(good, new, inside)
        skipped = (~good).to(torch.float32)
        if "skipped" in metrics:
            skipped = torch.maximum(skipped, metrics["skipped"])
        told = {name: value for name, value in metrics.items() if name != _OVERFLOW}
        opt = Scaled(new.opt, *_adapted(own, good, factor, patience, least))
        # A copy: the state's own goes to whoever donates that.
        name = "loss_scale" if "scale" in told else "scale"
        return new._replace(opt=opt), {**told, "skipped": skipped, name: own.scale.clone()}

    def stage() -> Stage:
        facts = {
            "scale": f"{initial:g} at first, times {factor:g} after {patience} good steps",
            "where a gradient overflows": f"the step is skipped, the scale divided by {factor:g} (to {least:g} at least)",
        }
        return Stage("loss_scaled", facts, [explain(step)])

    def remake(grad: Any) -> Step:
        return loss_scaled(step.remade(grad), initial=initial, factor=factor, patience=patience, least=least)

    return Step(init, update, stage, grad=step.grad, remake=remake, takes=step.takes)


def _adapted(own: Scaled, good: Tensor, factor: float, patience: int, least: float) -> tuple[Tensor, Tensor]:
    """The scale and the count of good steps after one more."""
    count = own.good + 1
    ripe = count >= patience
    grown, shrunk = own.scale * factor, (own.scale / factor).clamp(min=least)
    raised = torch.where(ripe & grown.isfinite(), grown, own.scale)
    return torch.where(good, raised, shrunk), torch.where(good & ~ripe, count, 0)


# --- the scale's way to the innermost loss ---------------------------------------------------------------------------

# The name of the measure that tells, among the metrics of the step inside, whether a gradient was not finite.
_OVERFLOW = "loss_scale.overflow"
_PARAMS, _SCALE = "params", "scale"


class _AtScale:
    """A gradient at a scale: hands it in with the params, which reach the innermost gradient whole, whoever cuts the batch."""

    def __init__(self, heart: Any, scale: Tensor, whole: bool) -> None:
        self.heart, self.scale, self.whole = heart, scale, whole
        self.uses, self.lanes, self.reduce = heart.uses, heart.lanes, heart.reduce

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Any:
        return self.heart(self._with(params), batch, carry=carry, key=key)

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        taken: Gradient = self.heart.finished(self._with(params), batch, carry=carry, key=key)
        return taken

    def _with(self, params: Tree) -> Tree:
        return {_PARAMS: params, _SCALE: self.scale}


class _Unscaling:
    """The innermost gradient, of the scaled loss, divided by the scale; its measures tell whether it is finite."""

    whole = True

    def __init__(self, inner: Grad) -> None:
        self.inner = inner
        self.uses, self.lanes, self.reduce = inner.uses, inner.lanes, inner.reduce
        # What it is of lies a level deeper in what it is given.
        names = (inner.of,) if isinstance(inner.of, str) else inner.of
        self.of = _PARAMS if names is None else tuple(f"{_PARAMS}.{name}" for name in names)

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        return _unscaled(self._at(params)(params[_PARAMS], batch, carry=carry, key=key), params[_SCALE])

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        return _unscaled(self._at(params).finished(params[_PARAMS], batch, carry=carry, key=key), params[_SCALE])

    def _at(self, params: Tree) -> Grad:
        mine = copy.copy(self.inner)
        mine.loss = partial(_multiplied, self.inner.loss, "carry" in self.uses, params[_SCALE])
        return mine

    def explain(self) -> Stage:
        return explain(self.inner)


def _multiplied(loss: Callable[..., Any], carries: bool, scale: Tensor, params: Tree, batch: Tree, **given: Any) -> Any:
    taken = losses.normalised(loss(params, batch, **given), carries)
    if not isinstance(taken.losses, Tensor) or not taken.losses.is_floating_point():
        # What breaks the contract is refused where every loss is.
        return taken
    values = taken.losses.to(torch.promote_types(taken.losses.dtype, torch.float32))
    return taken._replace(losses=values * scale.to(values.dtype))


def _unscaled(taken: Gradient, scale: Tensor) -> Gradient:
    grads, loss = divided((taken.grads, taken.loss), scale)
    bad = (~all_finite(tree.leaves(grads))).to(torch.float32)
    named = {f"aux.{name}" if name == "scale" else name: leaf for name, leaf in losses.measures(taken.aux).items()}
    return taken._replace(grads=grads, loss=loss, aux={**named, _OVERFLOW: bad.to(loss.device)})


# --- what is refused ---------------------------------------------------------------------------------------------------


def _check_numbers(initial: Any, factor: Any, patience: Any, least: Any) -> None:
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ArgumentError(f"loss_scaled: patience must be a number of steps of at least 1, got {patience!r}")
    for name, value, low in (("least", least, 0.0), ("factor", factor, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            raise ArgumentError(f"loss_scaled: {name} must be a finite number above {low:g}, got {value!r}")
    largest = torch.finfo(torch.float32).max
    if isinstance(initial, bool) or not isinstance(initial, int | float) or not least <= initial <= largest:
        raise ArgumentError(f"loss_scaled: initial must be a float32 of at least `least`, {least:g}, got {initial!r}")


def _check_params(params: Tree) -> None:
    half = [path for path, leaf in tree.named(params).items() if getattr(leaf, "dtype", None) == torch.float16]
    if half:
        raise TreeError(
            f"params {', '.join(tree.quoted(half[:3]))}{' …' if len(half) > 3 else ''} are float16, and so would their "
            "gradients be, which underflow once the scale is divided out: keep params in float32, and compute in float16 by "
            "ft.mixed(loss, 'compute=float16')"
        )
