"""What all optimizers share: the pair of functions, and hyperparameters that live as tensors in the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage
from functrain.core.tree import Tree

State = TypeVar("State")


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


@dataclass(frozen=True)
class Optimizer:
    """A stateless optimizer: two pure functions.

    - `init(params) -> state`;
    - `update(grads, state, params) -> (updates, state)`: `params + updates` are the new params. Plain tensor
      arithmetic: it can be vmapped, differentiated and compiled.
    - `fused(grads, state, params) -> (params, state)`, where there is one: the same by torch's fused kernel, *in place* in
      `params` and `state`. Steps use it on buffers that are theirs alone, outside of transforms and compilation.
    """

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    fused: Callable[[Tree, Any, Tree], tuple[Tree, Any]] | None = None
    name: str = "optimizer"
    settings: dict[str, Hyper] = field(default_factory=dict)

    def explain(self) -> Stage:
        """The optimizer's name and hyperparameters."""
        return Stage(self.name, {name: repr(value) for name, value in self.settings.items()})


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`params + updates`, leaf by leaf.

    >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -1.0])})
    {'w': tensor([2., 0.])}
    """
    return tree.map(torch.add, params, updates)


# --- hyperparameters -------------------------------------------------------------------------------------------


def place(settings: dict[str, Hyper], params: Tree) -> dict[str, Any]:
    """Hyperparameters as 0-d float64 tensors on the params' device; a schedule becomes a dict of its numbers."""
    device = next((leaf.device for leaf in tree.leaves(params)), torch.device("cpu"))
    dtype = torch.float64 if device.type != "mps" else torch.float32

    def tensor(value: float) -> Tensor:
        return torch.tensor(float(value), dtype=dtype, device=device)

    return {
        name: {key: tensor(number) for key, number in value.values.items()} if isinstance(value, Schedule) else tensor(value)
        for name, value in settings.items()
    }


def resolve(settings: dict[str, Hyper], placed: dict[str, Any], count: Tensor) -> dict[str, Tensor]:
    """Every hyperparameter's value for the update after `count` updates."""
    return {
        name: value.rule(count, placed[name]) if isinstance(value, Schedule) else placed[name]
        for name, value in settings.items()
    }


def checked(name: str, value: Hyper, low: float = 0.0, high: float = math.inf) -> Hyper:
    """`value` when it is a schedule or a number in [low, high); else an `ArgumentError` that names it."""
    if isinstance(value, Schedule):
        first = float(value(0))
        if not all(map(math.isfinite, value.values.values())) or not low <= first < high:
            expected = f"a number {_within(low, high)}"
            raise ArgumentError(f"{name} is on the schedule {value!r}, which begins at {first:g}: expected {expected}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise ArgumentError(f"{name} must be a number {_within(low, high)} or a schedule, got {value!r}")
    return float(value)


def _within(low: float, high: float) -> str:
    return f"in [{low:g}, {high:g})" if high < math.inf else f"of at least {low:g}"


def checked_state(state: Any, kind: type[Any]) -> None:
    """Raise `TreeError` when `state` is not of the kind that an optimizer's `init` makes."""
    if not isinstance(state, kind):
        raise TreeError(f"expected the {kind.__name__} that this optimizer's init makes, got {type(state).__name__}")


def checked_grads(grads: Tree, params: Tree) -> None:
    """Raise `TreeError`, naming the path, when grads and params differ in structure."""
    if not tree.same_structure(params, grads):
        raise TreeError(f"grads do not have the structure of params: {tree.difference(params, grads)}")


def hyper(state: Any) -> dict[str, Any]:
    """The hyperparameters inside a state (an optimizer's or a step's), by name."""
    inner = getattr(state, "opt", state)
    if not hasattr(inner, "hyper"):
        raise ArgumentError(f"{type(inner).__name__} has no hyperparameters")
    return inner.hyper


def with_hyper(state: State, **values: float | Tensor) -> State:
    """The same state with other hyperparameters: `with_hyper(state, lr=0.1)`; a schedule's number is `lr_peak`.

    Raises `ArgumentError` for a name that the state does not have.

    >>> from functrain.core.optim import sgd
    >>> state = sgd(0.5).init({"w": torch.ones(2)})
    >>> with_hyper(state, lr=0.25).hyper["lr"]
    tensor(0.2500, dtype=torch.float64)
    """
    known = _flat(hyper(state))
    for name in values:
        if name not in known:
            raise ArgumentError(f"no hyperparameter {name!r}: expected one of {', '.join(tree.quoted(known))}")

    def replaced(name: str, old: Tensor) -> Tensor:
        if name not in values:
            return old
        value = torch.as_tensor(values[name], dtype=old.dtype, device=old.device)
        if value.ndim and value.shape != old.shape:
            raise ArgumentError(f"{name} has shape {tuple(old.shape)} in the state, got {tuple(value.shape)}")
        # Of a population, one number is meant for every member.
        return value.expand(old.shape).clone()

    new = {
        name: {key: replaced(f"{name}_{key}", old) for key, old in value.items()}
        if isinstance(value, dict)
        else replaced(name, value)
        for name, value in hyper(state).items()
    }
    if hasattr(state, "opt"):
        return state._replace(opt=state.opt._replace(hyper=new))  # type: ignore[attr-defined]
    return state._replace(hyper=new)  # type: ignore[attr-defined]


def _flat(placed: dict[str, Any]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in placed.items():
        flat.update({f"{name}_{key}": number for key, number in value.items()} if isinstance(value, dict) else {name: value})
    return flat
