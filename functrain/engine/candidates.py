"""The plans that a step could run by: which are the same computation, which are refused, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from functrain.core import reduce
from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage, explain
from functrain.core.health import Monitor
from functrain.core.reduce.base import Reducer
from functrain.core.step import Step
from functrain.engine.parallel import Parallel, parallel
from functrain.engine.workers import default_workers

# Those that need least come first.
PLANS = ("fused", "loop", "threads", "vmap")
PARTS = (1, 2, 4, 8, 16)


class Candidate(NamedTuple):
    """A plan and the step that runs by it, or the reason why there is none.

    - `how`, `parts`, `workers`: the plan; `plain` is a gradient that is not cut;
    - `alike`: whether it has to give the loss that the step as given does.
    """

    how: str
    parts: int
    workers: int
    step: Step | None
    reason: str = ""
    alike: bool = True


class _Around(NamedTuple):
    """What all candidates have in common: a step, what stands around its parts, and what their gradient is made of."""

    step: Step
    replaced: Callable[[Any], Any]
    inner: Any
    reducer: Reducer
    exact: bool
    budget: int | None

    def by(self, how: Any, parts: int, workers: int) -> Step:
        """The step by another plan."""
        grad = parallel(self.inner, parts, self.reducer, how=how, workers=workers, exact=self.exact, budget=self.budget)
        return self.step.remade(self.replaced(grad))

    def refusal(self, how: str, parts: int) -> str:
        """Why there is no such step, or nothing."""
        try:
            self.by(how, parts, 1)
        except ArgumentError as error:
            # The reason without the advice: nobody has asked for this plan.
            return str(error).partition(": ")[0]
        return ""


def candidates(
    step: Step, plans: Sequence[str], parts: Sequence[int] | None, workers: Sequence[int] | None, size: int | None
) -> Iterator[Candidate]:
    """The step as given, every plan that is another computation, and those that are refused.

    `parts` and `workers`: None for the default; `size`: how many examples there are, where that is known.
    """
    given, around = _given(step)
    yield given
    # Where one backward pass is the sum over parts, the number of parts is a matter of speed; elsewhere one of mathematics.
    obstacle = around.refusal("fused", given.parts)
    if parts is None:
        parts = [given.parts] if obstacle else _usual(given.parts, size)
    in_graph = "compiled" in titles(explain(step))
    seen = {_computation(given.how, given.parts, given.workers, in_graph)}
    refused: dict[tuple[str, str], Candidate] = {}
    for how, number, count in _grid(plans, parts, given.parts, workers or _processors()):
        reason = around.refusal(how, number)
        if how == "threads" and in_graph:
            reason = "inside a graph, threads are looped: see loop"
        kind = _computation(how, number, count, in_graph)
        if reason:
            refused.setdefault((how, reason), Candidate(how, number, count, None, reason))
        elif kind not in seen:
            seen.add(kind)
            alike = not obstacle or number == given.parts
            yield Candidate(how, number, count, around.by(how, number, count), alike=alike)
    yield from refused.values()


def _given(step: Step) -> tuple[Candidate, _Around]:
    grad, replaced = _varied(step.grad)
    if isinstance(grad, Parallel):
        how = grad.plan.how
        own = Candidate(how, grad.parts, grad.workers if how == "threads" else 1, step)
        return own, _Around(step, replaced, grad.grad, grad.reduce, grad.exact, grad.budget)
    reducer = grad.reduce if grad.reduce.linear else reduce.mean
    return Candidate("plain", 1, 1, step), _Around(step, replaced, grad, reducer, False, None)


def _varied(grad: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The gradient inside `grad` that is cut, or would be, and a function that puts another in its place."""
    # A monitor measures what comes of all parts, so it stays outside; other combinators do if what they hold is cut already.
    if not isinstance(grad, Monitor) and (isinstance(grad, Parallel) or not _cut_inside(grad)):
        return grad, lambda other: other
    inner, replaced = _varied(grad.grad)

    def around(other: Any) -> Any:
        whole = copy.copy(grad)
        whole.grad = replaced(other)
        return whole

    return inner, around


def _cut_inside(grad: Any) -> bool:
    inner = getattr(grad, "grad", None)
    return inner is not None and (isinstance(inner, Parallel) or _cut_inside(inner))


def _usual(own: int, size: int | None) -> list[int]:
    return sorted({own, *(number for number in PARTS if size is None or number <= size)})


def _processors() -> list[int]:
    most = default_workers()
    return sorted({most, *(2**power for power in range(1, most.bit_length()))})


def _grid(plans: Sequence[str], parts: Sequence[int], own: int, workers: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    for how in plans:
        # Fused, it makes no difference how many parts there are.
        for number in [own if own in parts else parts[0]] if how == "fused" else parts:
            for count in dict.fromkeys(min(count, number) for count in workers) if how == "threads" else [1]:
                yield how, number, count


def _computation(how: str, parts: int, workers: int, in_graph: bool) -> tuple[str, int, int]:
    """What is equal for two plans that compute the same things in the same order."""
    if parts == 1 or how in ("fused", "plain"):
        return "whole", 1, 1
    if how == "threads" and (in_graph or workers == 1):
        return "loop", parts, 1
    return how, parts, workers


def titles(stage: Stage) -> list[str]:
    """The titles of a stage and of all below it.

    >>> titles(Stage("compiled", inner=[Stage("step")]))
    ['compiled', 'step']
    """
    return [stage.title, *(title for inner in stage.inner for title in titles(inner))]
