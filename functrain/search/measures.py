"""Measures: what is said of a state, held to its contract: numbers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functrain.core.errors import ArgumentError


def number(value: Any, name: str, advice: str) -> float:
    """The number that `value` is, 0-d tensors and arrays included; raises `ArgumentError`, with `advice`, for another.

    >>> number(3, "measure 'loss'", "a number is expected")
    3.0
    """
    if not isinstance(value, (str, bytes)) and getattr(value, "ndim", 0) == 0:
        try:
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise ArgumentError(f"{name} is {value!r} ({type(value).__name__}): {advice}")


def measured(evaluate: Callable[[Any], Any], state: Any) -> dict[str, float]:
    """The measures that `evaluate` gives of a state; raises `ArgumentError` when they are no numbers by name.

    >>> measured(lambda state: {"test/loss": state / 2}, 3)
    {'test/loss': 1.5}
    """
    found = evaluate(state)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ArgumentError(
            f"evaluate(state) returned {found!r} ({type(found).__name__}): expected a dict of numbers by name, "
            "such as {'test/loss': 0.5}"
        )
    return {name: number(value, f"measure {name!r}", "expected a number") for name, value in found.items()}
