"""What a program will do, as text: a tree of stages, each with the facts and reasons behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Stage:
    """One stage of a program: a title, facts about it (`name: text`), and the stages it stands on."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    inner: Sequence[Stage] = ()

    def lines(self, indent: str = "") -> list[str]:
        """The stage and all below it, one line a fact."""
        rows = [indent + self.title]
        last = len(self.inner) - 1
        bar = "│ " if self.inner else "  "
        rows += [f"{indent}{bar}  {name}: {text}" for name, text in self.facts.items()]
        for number, stage in enumerate(self.inner):
            head, *rest = stage.lines()
            rows.append(indent + ("└─ " if number == last else "├─ ") + head)
            rows += [indent + ("   " if number == last else "│  ") + row for row in rest]
        return rows

    def __str__(self) -> str:
        return "\n".join(self.lines())


@runtime_checkable
class Explainable(Protocol):
    """Anything that can say what it will do."""

    def explain(self) -> Stage:
        """The stage that this object is."""
        ...


def explain(program: Any) -> Stage:
    """What `program` (a source, gradient, step or combinator of them) will run, where, and why that plan.

    Returns a `Stage`, which prints as a tree. A plain function is shown by its name.

    >>> print(explain(Stage("step", {"state": "donated"}, [Stage("grad", {"plan": "fused"})])))
    step
    │   state: donated
    └─ grad
           plan: fused
    """
    if isinstance(program, Stage):
        return program
    if isinstance(program, Explainable):
        return program.explain()
    name = getattr(program, "__qualname__", None) or type(program).__name__
    return Stage(f"function {name}" if callable(program) else name)
