"""What a step around a step asks of the step and the states that it is given."""

from __future__ import annotations

from typing import Any, TypeVar

from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import explain
from functrain.core.step import Step, check_owned

Kind = TypeVar("Kind")


def check_inner(step: Any, name: str) -> None:
    """Raise `ArgumentError` unless `step` is a step, and one that keeps the state it is given."""
    if not isinstance(step, Step):
        raise ArgumentError(f"{name} takes a step, got {explain(step).title}: write ft.{name}(ft.step(grad, optimizer))")
    if step.donates:
        raise ArgumentError(f"{name} cannot be made of a donating step: donate outside, ft.compiled(ft.{name}(step))")


def opened(state: Any, kind: type[Kind], name: str) -> Kind:
    """What the combinator `name` keeps in `state.opt`, around the inner step's, a NamedTuple `kind`.

    Raises `DonatedError` for a state that was given away, `TreeError` for one of a population or of another step.
    """
    check_single(state, name)
    if not isinstance(state.opt, kind):
        raise TreeError(
            f"expected a state as ft.{name}(step).init makes it, whose opt is {kind.__name__}; this one's is "
            f"{type(state.opt).__name__}: start with init, or ft.{name} is not where it was among the steps around the step"
        )
    return state.opt


def check_single(state: Any, name: str) -> None:
    """Raise `DonatedError` for a state that was given away, `TreeError` for one of a population."""
    check_owned(state)
    if state.position.ndim:
        raise TreeError(f"this is the state of a population: make one of such steps, ft.population(ft.{name}(step))")
