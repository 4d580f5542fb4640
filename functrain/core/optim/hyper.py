"""Hyperparameters as tensors in an optimizer's state: how they get there, are read, and are replaced."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.optim.base import Schedule, Settings
from functrain.core.tree import Tree

State = TypeVar("State")


def number_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the numbers that all leaves share: float64 where the device has it."""
    return torch.float64 if device.type != "mps" else torch.float32


def place(settings: Settings, params: Tree) -> dict[str, Any]:
    """Hyperparameters as 0-d float64 tensors on the params' device; a schedule becomes a dict of its numbers."""
    device = next((leaf.device for leaf in tree.leaves(params)), torch.device("cpu"))
    dtype = number_dtype(device)

    def tensor(value: float) -> Tensor:
        return torch.tensor(float(value), dtype=dtype, device=device)

    return {
        name: {key: tensor(number) for key, number in value.values.items()} if isinstance(value, Schedule) else tensor(value)
        for name, value in settings.items()
    }


def resolve(settings: Settings, placed: dict[str, Any], count: Tensor) -> dict[str, Tensor]:
    """Every hyperparameter's value for the update after `count` updates."""
    return {
        name: value.rule(count, placed[name]) if isinstance(value, Schedule) else placed[name]
        for name, value in settings.items()
    }


def scheduled(optimizer: Any, state: Any) -> dict[str, Tensor]:
    """The present value of every hyperparameter on a schedule, by the name that `hyper` gives it."""
    found: dict[tuple[str, ...], Tensor] = {}
    for labels, one, its_state in _optimizers(optimizer, state):
        varying = {name: value for name, value in getattr(one, "settings", {}).items() if isinstance(value, Schedule)}
        if varying:
            now = resolve({**varying}, its_state.hyper, its_state.steps)
            found |= {(*labels, name): value for name, value in now.items()}
    return _shortened(found, list(_places(state))) if found else {}


def shown(optimizer: Any, state: Any) -> dict[str, Tensor]:
    """What else of a state an optimizer wants to be seen, named as hyperparameters are: copies, as a state may be donated."""
    found = {
        (*labels, name): getattr(its_state, name).clone()
        for labels, one, its_state in _optimizers(optimizer, state)
        for name in getattr(one, "shown", ())
    }
    return _shortened(found, [*_places(state), *found.items()]) if found else {}


def _optimizers(optimizer: Any, state: Any, labels: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    yield labels, optimizer, state
    for label, one in getattr(optimizer, "inner", {}).items():
        yield from _optimizers(one, state.inner[label], (*labels, label))


def hyper(state: Any) -> dict[str, Any]:
    """The hyperparameters inside a state (an optimizer's or a step's), by name.

    Of an optimizer made of others, a name that two of them have is qualified by as many of their labels as tell them apart:
    `"generator.lr"`. What is on a schedule is the dict of its numbers; `with_hyper` calls them `lr_peak` and so on.
    """
    placed = dict(_places(state))
    return _shortened(placed, list(placed.items()))


def with_hyper(state: State, **values: float | Tensor) -> State:
    """The same state with other hyperparameters: `with_hyper(state, lr=0.1)`; a schedule's number is `lr_peak`.

    Names are those of `hyper(state)`, or fully qualified: `with_hyper(state, **{"generator.lr": 0.1})`.
    Raises `ArgumentError` for a name that the state does not have, and for what is no finite number.

    >>> from functrain.core.optim import sgd
    >>> state = sgd(0.5).init({"w": torch.ones(2)})
    >>> with_hyper(state, lr=0.25).hyper["lr"]
    tensor(0.2500, dtype=torch.float64)
    """
    placed = dict(_checked_places(state))
    short = _short_names(list(placed))
    known: dict[str, tuple[str, ...]] = {}
    for path, value in placed.items():
        for name in {short[path], ".".join(path)}:
            known |= {f"{name}_{key}": (*path, key) for key in value} if isinstance(value, dict) else {name: path}
    for name in values:
        if name not in known:
            names = ", ".join(tree.quoted(known))
            raise ArgumentError(f"no hyperparameter {name!r}: expected one of {names}{_why(name, placed)}")
    return _replaced(state, (), {known[name]: value for name, value in values.items()})


def _why(name: str, placed: Mapping[tuple[str, ...], Any]) -> str:
    if any(path[-1] == name.split(".")[-1] and isinstance(value, dict) for path, value in placed.items()):
        return f" ({name} is on a schedule: replace its numbers)"
    return " (what was 0 when the optimizer was made may cost nothing, and be none)"


def _replaced(state: Any, labels: tuple[str, ...], new: Mapping[tuple[str, ...], float | Tensor]) -> Any:
    if hasattr(state, "opt"):
        return state._replace(opt=_replaced(state.opt, labels, new))
    changes: dict[str, Any] = {}
    if isinstance(getattr(state, "hyper", None), dict):
        changes["hyper"] = {
            name: {key: _number(old, new, (*labels, name, key)) for key, old in value.items()}
            if isinstance(value, dict)
            else _number(value, new, (*labels, name))
            for name, value in state.hyper.items()
        }
    inner = getattr(state, "inner", None)
    if isinstance(inner, dict):
        changes["inner"] = {label: _replaced(one, (*labels, label), new) for label, one in inner.items()}
    elif inner is not None:
        changes["inner"] = _replaced(inner, (*labels, "inner"), new)
    return state._replace(**changes) if changes else state


def _number(old: Tensor, new: Mapping[tuple[str, ...], float | Tensor], path: tuple[str, ...]) -> Tensor:
    if path not in new:
        return old
    given = new[path]
    if isinstance(given, bool | str) or not isinstance(given, Tensor | int | float | Sequence | np.ndarray | np.generic):
        raise ArgumentError(f"{'.'.join(path)} is a number or a tensor in the state, got {given!r}")
    if isinstance(given, int | float) and not math.isfinite(given):
        raise ArgumentError(f"{'.'.join(path)} must be finite, got {given!r}")
    value = torch.as_tensor(given, dtype=old.dtype, device=old.device)
    if value.ndim and value.shape != old.shape:
        raise ArgumentError(f"{'.'.join(path)} has shape {tuple(old.shape)} in the state, got {tuple(value.shape)}")
    # Of a population, one number is meant for every member.
    return value.expand(old.shape).clone()


Place = tuple[tuple[str, ...], Any]


def _places(state: Any, labels: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every hyperparameter inside a state, with the labels on the way to it."""
    state = getattr(state, "opt", state)
    placed = getattr(state, "hyper", None)
    if isinstance(placed, dict):
        yield from (((*labels, name), value) for name, value in placed.items())
    inner = getattr(state, "inner", None)
    if isinstance(inner, dict):
        for label, one in inner.items():
            yield from _places(one, (*labels, label))
    elif inner is not None:
        yield from _places(inner, (*labels, "inner"))


def _checked_places(state: Any) -> list[Place]:
    found = list(_places(state))
    if not found:
        raise ArgumentError(f"{type(getattr(state, 'opt', state)).__name__} has no hyperparameters")
    return found


def placed_in(state: Any) -> list[Any]:
    """Every hyperparameter inside a state, as it lies there."""
    return [value for _, value in _places(state)]


def _shortened(found: dict[tuple[str, ...], Any], beside: list[Place]) -> dict[str, Any]:
    short = _short_names([path for path, _ in beside])
    return {short[path]: value for path, value in found.items()}


def _short_names(paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    # A name that one place alone has needs no labels, others as many as tell them apart.
    ends = Counter(path[start:] for path in paths for start in range(len(path)))
    return {path: ".".join(_end(path, ends)) for path in paths}


def _end(path: tuple[str, ...], ends: Counter[tuple[str, ...]]) -> tuple[str, ...]:
    return next((path[start:] for start in reversed(range(len(path))) if ends[path[start:]] == 1), path)
