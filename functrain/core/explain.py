"""What a program will do, as text: a tree of stages, each with the facts and reasons behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import optree


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

    def has(self, title: str) -> bool:
        """Whether this stage, or one below it, has that title."""
        return self.title == title or any(stage.has(title) for stage in self.inner)

    def __str__(self) -> str:
        return "\n".join(self.lines())


@runtime_checkable
class Explainable(Protocol):
    """Anything that can say what it will do."""

    def explain(self) -> Stage:
        """The stage that this object is."""
        ...


class TimesParams(str):
    """A memory figure as a multiple of what the params take: text that `explain` turns into bytes when it knows them."""

    times: float


def times_params(times: float, note: str = "") -> TimesParams:
    """`times` as many bytes as the params take.

    >>> times_params(3, "at most")
    '3 × params, at most'
    """
    text = TimesParams(f"{times:g} × params{', ' + note if note else ''}")
    text.times = times
    return text


def _in_bytes(stage: Stage, size: int) -> Stage:
    facts = {
        name: f"{text} ({readable(int(text.times * size))})" if isinstance(text, TimesParams) else text
        for name, text in stage.facts.items()
    }
    return Stage(stage.title, facts, [_in_bytes(inner, size) for inner in stage.inner])


def readable(size: int) -> str:
    """A number of bytes in the unit that suits it.

    >>> readable(512), readable(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    for power, unit in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} B"


def explain(program: Any, params: Any = None) -> Stage:
    """What `program` (a source, gradient, step or combinator of them) will run, where, and why that plan.

    Returns a `Stage`, which prints as a tree. A plain function is shown by its name. With `params` (or a state that has
    them) memory is told in bytes too.

    >>> print(explain(Stage("step", {"state": "donated"}, [Stage("grad", {"plan": "fused"})])))
    step
    │   state: donated
    └─ grad
           plan: fused
    """
    if params is not None:
        leaves = optree.tree_leaves(getattr(params, "params", params))
        return _in_bytes(explain(program), sum(leaf.nbytes for leaf in leaves))
    if isinstance(program, Stage):
        return program
    if isinstance(program, Explainable):
        return program.explain()
    name = getattr(program, "__qualname__", None) or type(program).__name__
    return Stage(f"function {name}" if callable(program) else name)
