"""What all optimizers share: the pair of functions, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.tree import Tree


@dataclass(frozen=True)
class Schedule:
    """A hyperparameter as a function of the count of updates: `rule(count, values) -> 0-d tensor`.

    Its numbers are `values`; they are kept in the optimizer's state beside the constants, so that a schedule can be
    vmapped over, differentiated or replaced without making another step.
    """

    name: str
    rule: Callable[[Tensor, dict[str, Tensor]], Tensor]
    values: dict[str, float]

    def __call__(self, count: int | Tensor) -> Tensor:
        """The value at update `count` (0 for the first): a 0-d float64 tensor, or the shape of `count`."""
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.values.items()}
        return self.rule(torch.as_tensor(count), values)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value:g}' for name, value in self.values.items())})"


Hyper = float | Schedule
Settings = dict[str, Hyper]


@dataclass(frozen=True)
class Optimizer:
    """A stateless optimizer, or a part of one: two pure functions.

    - `init(params) -> state`;
    - `update(grads, state, params, **extra) -> (updates, state)`: `params + updates` are the new params. Plain tensor
      arithmetic: it can be vmapped, differentiated and compiled. `uses` names the `extra` it is given, of `"loss"`
      (0-d, the mean loss of the params before the update) and `"key"` (0-d int64, the update's randomness);
    - `fused(grads, state, params, **extra) -> (params, state)`, where there is one: the same without temporary copies, *in
      place* in `params` and `state`. Steps use it on buffers that are theirs alone, outside of transforms and compilation.

    `settings` are its hyperparameters as they were given; `inner` are the optimizers that it is made of, by label. The
    state then holds theirs in a field `inner`, a dict by the same labels. A `part` changes what passes through it, and
    leads nowhere by itself. `shown` names fields of the state, 0-d each, that
    a step's metrics show as they are after the update.
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]
    fused: Callable[..., tuple[Tree, Any]] | None = None
    name: str = "optimizer"
    settings: Settings = field(default_factory=dict)
    uses: frozenset[str] = frozenset()
    inner: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    part: bool = False

    def explain(self) -> Stage:
        """The optimizer's name and hyperparameters."""
        facts = {name: repr(value) for name, value in self.settings.items()}
        return Stage(self.name, facts, [_labelled(label, explain(one)) for label, one in self.inner.items()])


def _labelled(label: str, stage: Stage) -> Stage:
    return Stage(stage.title if label.isdigit() or not label else f"{label}: {stage.title}", stage.facts, stage.inner)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`params + updates`, leaf by leaf.

    >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -1.0])})
    {'w': tensor([2., 0.])}
    """
    return tree.map(torch.add, params, updates)


def is_part(optimizer: Any) -> bool:
    """Whether nothing in an optimizer goes down a slope: clipping and the like, alone or several of them."""
    inner = getattr(optimizer, "inner", {})
    return all(map(is_part, inner.values())) if inner else bool(getattr(optimizer, "part", False))


def uses(optimizer: Any) -> frozenset[str]:
    """The extra arguments that an optimizer's update is given; none for a pair of functions from elsewhere."""
    return frozenset(getattr(optimizer, "uses", ()))


def updated(
    way: Callable[..., tuple[Tree, Any]], optimizer: Any, grads: Tree, state: Any, params: Tree, extra: Mapping[str, Tensor]
) -> tuple[Tree, Any]:
    """One way of an optimizer (its `update`, its `fused`), called with those of `extra` that it uses."""
    wanted = uses(optimizer)
    done = way(grads, state, params, **{name: value for name, value in extra.items() if name in wanted})
    if not isinstance(optimizer, Optimizer):
        _check_foreign(optimizer, done, params)
    return done


def fused_or_updated(
    optimizer: Any, grads: Tree, state: Any, params: Tree, extra: Mapping[str, Tensor]
) -> tuple[Tree, Any]:
    """The params and state after an update: in place where the optimizer has a way, else new ones."""
    if getattr(optimizer, "fused", None) is not None:
        return updated(optimizer.fused, optimizer, grads, state, params, extra)
    updates, state = updated(optimizer.update, optimizer, grads, state, params, extra)
    return apply_updates(params, updates), state


def share_of(extra: Mapping[str, Tensor], optimizer: Any, place: int) -> Mapping[str, Tensor]:
    """What the optimizer at `place` among others is given of their `extra`: a key of its own."""
    if "key" not in uses(optimizer) or "key" not in extra:
        return extra
    return {**extra, "key": random.fold_in(extra["key"], place)}


# --- what is refused ----------------------------------------------------------------------------------------------


def checked(name: str, value: Hyper, low: float = 0.0, high: float = math.inf) -> Hyper:
    """`value` when it is a schedule or a number in [low, high); else an `ArgumentError` that names it."""
    if isinstance(value, Schedule):
        return _checked_schedule(name, value, low, high)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        made = "; a function of the count is ft.optim.Schedule(name, rule, values)" if callable(value) else ""
        raise ArgumentError(f"{name} must be a number {_within(low, high)} or a schedule, got {value!r}{made}")
    return float(value)


# A compiled update cannot look at its rate: what is wrong with a schedule has to be seen when the optimizer is made.
_COUNTS = (0, 1, 2, 3, 10, 30, 100, 300, 1_000, 10_000, 100_000, 1_000_000)


def _checked_schedule(name: str, schedule: Schedule, low: float, high: float) -> Schedule:
    if not all(map(math.isfinite, schedule.values.values())):
        raise ArgumentError(f"{name} is on the schedule {schedule!r}: its numbers must be finite")
    for count in _COUNTS:
        value = schedule(count)
        if not isinstance(value, Tensor) or value.ndim:
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"{name}'s schedule {schedule!r} gives {got} at count {count}: expected a 0-d tensor")
        if not low <= float(value) < high:
            found = f"{name} is on the schedule {schedule!r}, which is {float(value):g} at count {count}"
            raise ArgumentError(f"{found}: expected a number {_within(low, high)}")
    return schedule


def _within(low: float, high: float) -> str:
    return f"in [{low:g}, {high:g})" if high < math.inf else f"of at least {low:g}"


def positive(name: str, value: Hyper) -> Hyper:
    """`value` when it is a schedule or a number above 0; else an `ArgumentError` that names it."""
    if not isinstance(value, Schedule) and value == 0:
        raise ArgumentError(f"{name} must be a number above 0 or a schedule, got {value!r}")
    return checked(name, value)


def counted(name: str, value: int, least: int = 1) -> int:
    """`value` when it is a whole number of at least `least`; else an `ArgumentError` that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def check_optimizers(owner: str, optimizers: Mapping[str, Any]) -> None:
    """Raise `ArgumentError`, naming the one, where one of the optimizers that `owner` is made of is none."""
    for name, one in optimizers.items():
        if not callable(getattr(one, "init", None)) or not callable(getattr(one, "update", None)):
            got = explain(one).title
            raise ArgumentError(f"{owner}: {name} is no optimizer, got {got}: expected for instance ft.optim.adamw(1e-3)")


def _check_foreign(optimizer: Any, done: Any, params: Tree) -> None:
    """Raise where what a pair of functions from elsewhere gives back is not `(updates, state)`, with updates like params."""
    name = type(optimizer).__name__
    if not isinstance(done, tuple) or len(done) != 2:
        raise ArgumentError(f"the update of {name} returned {type(done).__name__}: expected (updates, state)")
    if not tree.same_structure(params, done[0]):
        raise TreeError(f"the updates of {name} do not have the structure of params: {tree.difference(params, done[0])}")
    for path, update, param in zip(tree.paths(params), tree.leaves(done[0]), tree.leaves(params)):
        if not isinstance(update, Tensor) or update.shape != param.shape or update.dtype != param.dtype:
            kind = f"{tuple(update.shape)} of {update.dtype}" if isinstance(update, Tensor) else type(update).__name__
            raise TreeError(f"the update of {path!r} by {name} is {kind}, the parameter {tuple(param.shape)} of {param.dtype}")
    check_tensors(f"the state that the update of {name} returned", done[1])


def check_tensors(what: str, state: Tree) -> None:
    """Raise `TreeError` for a state with leaves that are not tensors."""
    for path, leaf in tree.named(state).items():
        if not isinstance(leaf, Tensor):
            raise TreeError(f"{what} has a leaf {path!r} of type {type(leaf).__name__}: states are trees of tensors")


def check_params(params: Tree) -> None:
    """Raise `TreeError`, naming the paths, where an optimizer is given params that are not real floating tensors."""
    if all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree.leaves(params)):
        return
    kinds = {path: getattr(leaf, "dtype", None) or type(leaf).__name__ for path, leaf in tree.named(params).items()}
    wrong = [f"{path!r} is {kind}" for path, kind in kinds.items() if not getattr(kind, "is_floating_point", False)]
    advice = "keep whole numbers in the carry or the batch, and complex ones as torch.view_as_real"
    raise TreeError(f"optimizers are defined for real floating params; {', '.join(wrong)}: {advice}")


def started(params: Tree) -> Tensor:
    """The count of updates before the first: 0-d int64, where the params are; `TreeError` as `check_params` raises it."""
    check_params(params)
    device = next((leaf.device for leaf in tree.leaves(params)), None)
    return torch.zeros((), dtype=torch.int64, device=device)


def check_state(state: Any, kind: type[Any]) -> None:
    """Raise `TreeError` when `state` is not of the kind that an optimizer's `init` makes."""
    if not isinstance(state, kind):
        raise TreeError(f"expected the {kind.__name__} that this optimizer's init makes, got {type(state).__name__}")


def check_grads(grads: list[Tensor], flat: list[Tensor], params: Tree) -> None:
    """Raise `TreeError`, naming the path, where a gradient does not have its parameter's shape."""
    for grad, param in zip(grads, flat):
        if grad.shape != param.shape:
            break
    else:
        return
    pairs = zip(tree.paths(params), grads, flat)
    path, grad, param = next(row for row in pairs if row[1].shape != row[2].shape)
    raise TreeError(f"the gradient of {path!r} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}")


def leaves_of(grads: Tree, params: Tree, spec: Any, flat: list[Tensor]) -> list[Tensor]:
    """The leaves of grads, which must be shaped like params: `TreeError` naming the path that differs."""
    try:
        leaves = spec.flatten_up_to(grads)
    except ValueError:
        raise TreeError(f"grads do not have the structure of params: {tree.difference(params, grads)}") from None
    check_grads(leaves, flat, params)
    return list(leaves)
