"""One step of an optimizer of torch's kind, as a function of what it kept from the steps before."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, FunctrainError
from functrain.core.optim.base import Schedule, Settings, checked
from functrain.core.optim.hyper import place, resolve


class Kept(NamedTuple):
    """What a torch optimizer keeps, as tensors: of each parameter, and of the group that all are in."""

    params: list[Any]
    group: dict[str, Any]


class TorchStep:
    """A class of torch optimizers with its options: a function that takes one step.

    - `settings`: the options that are floats, by name (of a tuple of floats, `betas_0`, `betas_1`); `fixed`: the others given;
    - `step(params, grads, kept, now)`: in the memory of `params`; see `ft.optim.from_torch` for what is refused.
    """

    def __init__(self, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
        self.kind = kind
        torchs = kind.__module__.split(".")[:2] == ["torch", "optim"]
        self.name = f"torch.optim.{kind.__name__}" if torchs else kind.__name__
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            why = "it computes the loss again within a step, and an update has gradients alone"
            raise ArgumentError(f"{self.name} needs a closure, which from_torch cannot give it: {why}")
        known = inspect.signature(kind).parameters
        defaults = {name: one.default for name, one in known.items() if one.default is not inspect.Parameter.empty}
        self.options = {**defaults, **options}
        self.settings: Settings = {}
        self.fixed: dict[str, Any] = {}
        for name, value in self.options.items():
            # A default of 0 stands for a float where the constructor says so.
            floats = name in known and "float" in str(known[name].annotation)
            for label, part in _parts(name, value):
                default = value is defaults.get(name)
                if isinstance(part, Schedule) or (_is_number(part, floats) and not (default and not math.isfinite(part))):
                    self.settings[label] = checked(label, part, -math.inf)
                elif not default:
                    self.fixed[name] = value
        self.changing: list[str] = []
        # What the class draws at random must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            self._try()

    def first(self) -> dict[str, float]:
        """The hyperparameters of the first update."""
        now = resolve(self.settings, place(self.settings, None), torch.tensor(0))
        return {name: value.item() for name, value in now.items()}

    def step(
        self, params: list[Tensor], grads: list[Tensor], kept: Kept | None, now: dict[str, float]
    ) -> tuple[list[Tensor], Kept]:
        """One step in the memory of `params`, and of `grads` and `kept` (None: nothing yet): params, and what is kept now."""
        # There is nothing to update in an empty leaf, and some classes divide by the number of elements.
        leaves = {place: leaf.detach().requires_grad_() for place, leaf in enumerate(params) if leaf.numel()}
        if not leaves:
            return params, Kept([{} for _ in params], {})
        with _refusals(self.name):
            one = self._made([*leaves.values()], now)
            (group,) = one.param_groups
            if kept is not None:
                one.state.update({leaf: _plain(kept.params[place]) for place, leaf in leaves.items()})
                group.update(_plain(kept.group))
            _step(one, [*leaves.values()], [grads[place] for place in leaves])
        its = {place: _tensors(self.name, one.state.get(leaf, {})) for place, leaf in leaves.items()}
        beside = {key: _tensors(self.name, group[key]) for key in self.changing}
        new = [leaves[place].detach() if place in leaves else leaf for place, leaf in enumerate(params)]
        return new, Kept([its.get(place, {}) for place in range(len(params))], beside)

    def _made(self, leaves: list[Tensor], now: dict[str, float]) -> torch.optim.Optimizer:
        options: dict[str, Any] = {
            name: tuple(now.get(label, part) for label, part in _parts(name, value))
            if isinstance(value, tuple | list)
            else now.get(name, value)
            for name, value in self.options.items()
        }
        return self.kind(leaves, **options)

    def _try(self) -> None:
        """Find what changes in the group, and that nothing else is kept: a few steps of one optimizer, and of this."""
        start = [torch.ones(2, 2), torch.eye(2)]
        now, grads = self.first(), [[(n - 1.5) * p - 0.25 for p in start] for n in range(4)]
        leaves = [leaf.clone().requires_grad_() for leaf in start]
        with _refusals(self.name):
            one = self._made(leaves, now)
            (group,) = one.param_groups
            changed: dict[str, None] = {}
            for row in grads:
                before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
                _step(one, leaves, [grad.clone() for grad in row])
                changed |= {key: None for key, value in group.items() if not _same(before.get(key), value)}
        own = [key for key in changed if key in self.options]
        if own:
            raise ArgumentError(f"{self.name} changes its option {own[0]!r} as it goes: from_torch keeps options as given")
        self.changing = list(changed)
        params, kept = [leaf.clone() for leaf in start], None
        for row in grads:
            params, kept = self.step(params, [grad.clone() for grad in row], kept, now)
        if not all(map(torch.equal, params, leaves)):
            raise ArgumentError(
                f"{self.name} depends on more than its `state` and the numbers of its group (its attributes, or a global "
                "generator of random numbers): that cannot be carried from update to update"
            )


def _step(one: torch.optim.Optimizer, leaves: list[Tensor], grads: list[Tensor]) -> None:
    for leaf, grad in zip(leaves, grads):
        leaf.grad = grad
    one.step()


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple | list):
        yield from ((f"{name}_{place}", part) for place, part in enumerate(value))
    else:
        yield name, value


def _is_number(value: Any, floats: bool) -> bool:
    return isinstance(value, float) or (floats and isinstance(value, int) and not isinstance(value, bool))


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    # The params are in the group as well.
    return before is after or (type(before) is type(after) and type(after) in _KINDS and before == after)


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        yield
    except FunctrainError:
        raise
    except Exception as error:
        raise ArgumentError(f"{name} does not take these options, params or gradients: {error}") from error


# --- what is kept, as tensors: the kind of a number is in the structure of the state -----------------------------------


class Truth(NamedTuple):
    """A bool, as a tensor."""

    value: Tensor


class Whole(NamedTuple):
    """An int, as a tensor."""

    value: Tensor


class Real(NamedTuple):
    """A float, as a tensor."""

    value: Tensor


_KINDS: dict[type, tuple[Any, torch.dtype]] = {
    bool: (Truth, torch.bool),
    int: (Whole, torch.int64),
    float: (Real, torch.float64),
}


def _tensors(name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in _KINDS:
        kind, dtype = _KINDS[type(value)]
        return kind(torch.tensor(value, dtype=dtype))
    if isinstance(value, dict):
        return {key: _tensors(name, one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_tensors(name, one) for one in value)
    raise ArgumentError(f"{name} keeps a {type(value).__name__} in its state: from_torch can carry tensors and numbers")


def _plain(value: Any) -> Any:
    if isinstance(value, Truth | Whole | Real):
        return value.value.item()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(one) for one in value)
    return value
