"""Steps one after another: `fold` over a source, and `repeat` inside one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from functrain.core import tree
from functrain.core.deferred import drawn
from functrain.core.errors import ArgumentError, PositionError
from functrain.core.explain import Stage, explain
from functrain.core.step import Metrics, Step, check_owned
from functrain.core.tree import Tree
from functrain.data.prefetch import Prefetch
from functrain.data.source import Source


def fold(step: Step, state: Any, batches: Any, *, steps: int | None = None) -> Iterator[tuple[Any, Metrics]]:
    """Run `step` over batches, from the state's own position on, giving `(state, metrics)` after each.

    - `batches`: a source, or `prefetch(source)`: step i uses batch i; past the end of an epoch the next one begins.
      Any other iterable is used from where it stands.
    - `steps`: until the state's position is `steps` more than now; default: to the end of the epoch the state is in
      (of an iterable: to its end).

    A step that takes n batches at once (`repeat`) is given stacks of them: that at position p uses stack p / n.

    Raises `ArgumentError` for a source without end when `steps` is not given, and for `steps` that are no multiple of n;
    `PositionError` for a state in the midst of a stack.

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch - params["mean"]) ** 2
    >>> train = ft.step(ft.grad(loss), ft.optim.sgd(0.25))
    >>> source = ft.arrays(torch.tensor([1.0, 2.0, 3.0, 4.0])).batch(2)
    >>> [round(float(m["loss"]), 3) for _, m in ft.fold(train, train.init({"mean": torch.tensor(0.0)}), source)]
    [2.5, 7.812]
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ArgumentError(f"steps must be an int of at least 0, got {steps!r}")
    check_owned(state)
    for batch in _batches(state, batches, _stacks(step, steps), step.takes):
        state, metrics = step(state, batch)
        yield state, metrics


def _stacks(step: Step, steps: int | None) -> int | None:
    if steps is not None and steps % step.takes:
        raise ArgumentError(f"this step takes {step.takes} batches at once: steps must be a multiple of that, got {steps}")
    return None if steps is None else steps // step.takes


def _batches(state: Any, batches: Any, steps: int | None, height: int) -> Iterator[Tree]:
    source = batches.source if isinstance(batches, Prefetch) else batches
    if not isinstance(source, Source):
        yield from _first(batches, steps)
        return
    start, inside = divmod(position(state), height)
    if inside:
        raise PositionError(
            f"the state is at position {position(state)}, inside a stack of {height} batches: go on to its end with a step "
            "that takes one at a time"
        )
    if steps is None:
        if source.length is None:
            raise ArgumentError("the source has no end: say how many steps, fold(step, state, source, steps=…)")
        steps = source.length - start % source.length if source.length else 0
    if steps == 0:
        return
    if isinstance(batches, Prefetch):
        yield from batches.between(start, start + steps)
        return
    endless = source if source.length is None else source.repeat()
    for place in range(start, start + steps):
        yield endless(place)


def _first(batches: Iterable[Tree], steps: int | None) -> Iterator[Tree]:
    items = iter(batches)
    for taken in range(steps) if steps is not None else iter(int, 1):
        try:
            yield next(items)
        except StopIteration:
            if steps is not None:
                raise PositionError(f"the batches ended after {taken} of {steps} steps") from None
            return


def position(state: Any) -> int:
    """The position of a state: the steps taken, and the index of the next batch. Members of a population share it."""
    return int(state.position.reshape(-1)[0])


def repeat(step: Step, steps: int) -> Step:
    """`steps` steps in one: takes batches stacked to `(steps, N, …)`, as `source.batch(N).batch(steps)` makes them.

    Metrics are stacked to `(steps,)`. Compiled, the steps are one graph, so that dispatch is paid once.
    Raises `ArgumentError` for fewer than one step, `TreeError` for a stack of another height.

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch - params["mean"]) ** 2
    >>> twice = ft.repeat(ft.step(ft.grad(loss), ft.optim.sgd(0.25)), 2)
    >>> state, metrics = twice(twice.init({"mean": torch.tensor(0.0)}), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> state.position, metrics["loss"]
    (tensor(2), tensor([2.5000, 7.8125]))
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps must be an int of at least 1, got {steps!r}")

    def update(state: Any, batches: Tree) -> tuple[Any, Metrics]:
        batches = drawn(batches)
        checked_stack("repeat", batches, steps)
        rows = []
        for batch in tree.unstack(batches):
            state, metrics = step.update(state, batch)
            rows.append(metrics)
        return state, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def stage() -> Stage:
        return Stage(f"repeat, {steps} steps in one", {}, [explain(step)])

    def remake(grad: Any) -> Step:
        return repeat(step.remade(grad), steps)

    return Step(step.init, update, stage, step.donates, step.grad, remake, steps * step.takes)


def checked_stack(name: str, batches: Tree, steps: int) -> None:
    """Raise `ArgumentError` unless `batches` are `steps` of them, stacked."""
    height = tree.batch_size(batches)
    if height != steps:
        advice = f"source.batch({steps}, drop_last=True)"
        raise ArgumentError(f"{name} takes {steps} batches stacked, got {height}: make them with {advice}")
