"""What a function depends on besides its arguments, and what it does to them: looked for, so that it can be refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as levels
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from functrain.core import tree
from functrain.core.errors import LossError


def layers(value: Tensor) -> Iterator[Tensor]:
    """A tensor as each level of torch.func sees it, from the innermost transform out to the plain tensor."""
    yield value
    while levels.is_gradtrackingtensor(value) or levels.is_batchedtensor(value):
        value = levels.get_unwrapped(value)
        yield value


def plain(value: Tensor) -> Tensor:
    """The tensor below all levels of torch.func, with the dimensions that they map over."""
    *_, last = layers(value)
    return last


def tracked(value: Tensor) -> bool:
    """Whether a derivative flows through this tensor: backward or forward, at any level.

    >>> tracked(torch.ones(1)), tracked(torch.ones(1, requires_grad=True))
    (False, True)
    """
    return any(layer.requires_grad or _has_tangent(layer) for layer in layers(value))


def _has_tangent(value: Tensor) -> bool:
    if forward_ad._current_level < 0 or levels.is_batchedtensor(value):
        return False
    return forward_ad.unpack_dual(value).tangent is not None


def mapped(value: Tensor) -> bool:
    """Whether a vmap around the caller maps over this tensor."""
    return any(map(levels.is_batchedtensor, layers(value)))


def closed_over(function: Callable[..., Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a function holds without being given them, each with the name of what holds it.

    Looked at are its closure, defaults, partial arguments and the object that it is bound to, and so on for functions among
    them; not global variables.

    >>> weight = torch.ones(1)
    >>> [name for name, _ in closed_over((lambda weight: lambda x: x * weight)(weight))]
    ['weight']
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", function)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += [(inner or name, item) for inner, item in _held(value)]


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        yield from (("", value.func), ("", value.args), *value.keywords.items())
    elif hasattr(value, "__func__"):
        yield from (("", value.__func__), *getattr(value.__self__, "__dict__", {}).items())
    elif hasattr(value, "__code__"):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            try:
                yield name, cell.cell_contents
            except ValueError:
                continue  # Not assigned yet.
        yield from (("", value.__defaults__), ("", value.__kwdefaults__))
    elif isinstance(value, dict | list | tuple):
        yield from (("", leaf) for leaf in tree.leaves(value))
    elif callable(value) and not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Raises `LossError` where one of `tensors` is written to within the block."""
    watched = [below for below in map(plain, tensors) if not below.is_inference()]
    before = [below._version for below in watched]
    yield
    if before != [below._version for below in watched]:
        raise LossError(
            "the function changes one of its arguments in place, and would be given the changed one when it is computed again: "
            "work on a copy (x * 2, not x.mul_(2))"
        )


class Unkeyed(TorchDispatchMode):
    """Raises `LossError` where torch's global generator is drawn from within the block."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, keywords):
            raise LossError(
                f"the function draws from torch's global generator ({func}), which would give other numbers when it is "
                "computed again: take them from ft.random with a key that is an argument; apply(params, x, key=key) serves "
                "nn.Dropout"
            )
        return func(*args, **keywords)


def _draws(func: Any, args: Any, keywords: Any) -> bool:
    # Attention's operators are tagged whether or not they drop anything.
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | keywords
    return "attention" not in func._schema.name or bool(given.get("dropout_p", 0.0))
