"""The learning-rate range test: a short run whose rate grows until the loss diverges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from functrain.core import tree
from functrain.core.errors import ArgumentError, NonFiniteError, TreeError
from functrain.core.explain import explain
from functrain.core.optim.hyper import hyper, with_hyper
from functrain.core.step import Metrics, Step, check_owned
from functrain.core.tree import Tree
from functrain.data.prefetch import Prefetch
from functrain.data.source import Source
from functrain.engine.fold import fold

# The smoothed loss has diverged when it is this many times the least that it has been.
_DIVERGED = 4.0


@dataclass(frozen=True)
class RangeTest:
    """What `lr_find` returns; `str` is a table.

    - `name`: the hyperparameter that was varied;
    - `rates`: its values, growing by one factor;
    - `losses`: the mean loss of the batch that each was used on, before its update;
    - `smoothed`: their exponential average, corrected for its start: Σⱼ βⁱ⁻ʲ lossⱼ / Σⱼ βⁱ⁻ʲ over j ≤ i;
    - `diverged`: whether the test ended because the loss did.
    """

    name: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool

    @property
    def minimum(self) -> float:
        """The rate at which the smoothed loss is least."""
        return self.rates[self._least]

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, by log rate; None when it never falls."""
        # Over two gaps: neighbours alone follow the noise.
        falls = [self.smoothed[place + 1] - self.smoothed[place - 1] for place in range(1, self._least)]
        return self.rates[1 + falls.index(min(falls))] if falls and min(falls) < 0 else None

    @property
    def suggestion(self) -> float | None:
        """A tenth of `minimum`, where the loss still falls and is far from diverging; None when it never falls."""
        return self.minimum / 10 if self._least else None

    @property
    def _least(self) -> int:
        return self.smoothed.index(min(self.smoothed))

    def __str__(self) -> str:
        marks = {self.minimum: "minimum", self.steepest: "steepest"}
        every = max(1, len(self.rates) // 16)
        lines = [f"{self.name:>10}{'loss':>12}{'smoothed':>12}"]
        for place, (rate, loss, smoothed) in enumerate(zip(self.rates, self.losses, self.smoothed)):
            if place % every == 0 or rate in marks or place == len(self.rates) - 1:
                lines.append(f"{rate:>10.2e}{loss:>12.4g}{smoothed:>12.4g}  {marks.get(rate, '')}".rstrip())
        return "\n".join([*lines, self._ending()])

    def _ending(self) -> str:
        if self.suggestion is None:
            return "the loss never fell: begin lower, or train from params that can still learn"
        more = "" if self.diverged else "; the loss did not diverge: a higher end may show more"
        return f"suggestion: {self.suggestion:.2g} (a tenth of the minimum's){more}"


def lr_find(
    step: Step,
    state: Any,
    source: Any,
    *,
    name: str = "lr",
    loss: str = "loss",
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
) -> RangeTest:
    """Run the step while its rate grows from `low` to `high`, and find where the loss falls and where it diverges.

    Step i of `steps` has the rate low · (high / low)^(i / (steps − 1)) and uses the batch at the state's position + i. It ends
    early when a loss is not finite, which is left out, or the smoothed loss is above its least by more than 3 · |least|.
    The state is copied, never changed or given away.

    - `step`: any step of one loss: compiled, donating, guarded, repeated;
    - `source`: what `ft.fold` takes: a source (past its end the next epoch begins), `ft.prefetch(source)` or an iterable;
    - `name`: the hyperparameter, as `ft.hyper(state)` names it: `"generator.lr"` where optimizers are combined;
      a rate on a schedule cannot be tested;
    - `loss`: which of the step's metrics to watch: `"generator.loss"` where players are combined;
    - `smoothing`: β of the exponential average, in [0, 1): the noisier the loss, the larger, and the later it sees a minimum.
      0 for a loss without noise (whole data in each batch): params may come so close to its optimum that an average goes on
      falling far beyond the rate that diverges.

    Raises `ArgumentError` for another kind of step or source, a rate on a schedule, names that the state or the metrics do not
    have, and unless 0 < low < high; `TreeError` for the state of a population; `NonFiniteError` when the first loss is not
    finite.

    Sources: Smith, "Cyclical learning rates for training neural networks", WACV 2017; growing by a factor, stopped at four
    times the least loss, and a tenth of the minimum's rate, as in fast.ai's learner.

    >>> import functrain as ft
    >>> step = ft.step(ft.grad(lambda params, batch: 0.5 * (params - batch) ** 2), ft.optim.sgd(0.1))
    >>> found = ft.lr_find(step, step.init(torch.tensor(1.0)), ft.arrays(torch.zeros(4)).batch(4), low=1e-3, smoothing=0)
    >>> found.diverged, 1.8 < found.minimum < 2.2  # it diverges above a rate of 2
    (True, True)
    """
    _check(step, state, source, low, high, steps, smoothing)
    _check_name(state, name)
    rates = tuple(low * (high / low) ** (place / (steps - 1)) for place in range(steps))
    losses: list[float] = []
    smoothed: list[float] = []
    total = weight = 0.0
    for value in _losses(step, tree.map(torch.clone, state), source, name, loss, rates):
        if not math.isfinite(value):
            break
        total, weight = smoothing * total + (1 - smoothing) * value, smoothing * weight + 1 - smoothing
        losses.append(value)
        smoothed.append(total / weight)
        least = min(smoothed)
        if smoothed[-1] > least + (_DIVERGED - 1) * abs(least):
            break
    else:
        return RangeTest(name, rates, tuple(losses), tuple(smoothed), diverged=False)
    if not losses:
        raise NonFiniteError(
            f"the loss is {value} before any update: there is no rate at which it is finite. Look at the params and at the "
            f"batch of position {int(state.position)}"
        )
    return RangeTest(name, rates[: len(losses)], tuple(losses), tuple(smoothed), diverged=True)


def _losses(step: Step, state: Any, source: Any, name: str, loss: str, rates: tuple[float, ...]) -> Iterator[float]:
    """The loss of each batch, while the rate grows; it ends with NaN where a guard raises."""
    coming = iter(rates)

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        return step(with_hyper(state, **{name: next(coming)}), batch)

    try:
        tested = Step(step.init, update, step.stage, takes=step.takes)
        for _, metrics in fold(tested, state, source, steps=len(rates) * step.takes):
            if loss not in metrics:
                raise ArgumentError(f"the step has no metric {loss!r}: loss= is one of {', '.join(tree.quoted(metrics))}")
            # A repeated step has a loss for each of its steps.
            yield float(metrics[loss].double().mean())
    except NonFiniteError:
        yield math.nan


# --- what is asked for ------------------------------------------------------------------------------------------------


def _check(step: Step, state: Any, source: Any, low: float, high: float, steps: int, smoothing: float) -> None:
    order = "write ft.lr_find(step, state, source)"
    if not isinstance(step, Step):
        raise ArgumentError(f"lr_find takes a step, got {explain(step).title}: {order}")
    check_owned(state)
    if state.position.ndim:
        raise TreeError(
            "this is the state of a population: find the rate of one member, with its own step, "
            "ft.lr_find(step, ft.tree.unstack(state)[0], source)"
        )
    if isinstance(source, Source | Prefetch) and source.length == 0:
        raise ArgumentError("the source has no batches: there is nothing to take a step on")
    for name, value in {"low": low, "high": high, "smoothing": smoothing}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ArgumentError(f"{name} must be a finite number, got {value!r}")
    if not 0 < low < high:
        raise ArgumentError(f"the rate grows from low to high, 0 < low < high: got {low=:g}, {high=:g}")
    if not 0 <= smoothing < 1:
        raise ArgumentError(f"smoothing must be a number in [0, 1), got {smoothing:g}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ArgumentError(f"steps must be an int of at least 2, got {steps!r}")


def _check_name(state: Any, name: str) -> None:
    schedules = {short: value for short, value in hyper(state).items() if isinstance(value, dict)}
    numbers = {f"{short}_{number}" for short, value in schedules.items() for number in value}
    if name in schedules or name in numbers or any(number.endswith(f".{name}") for number in numbers):
        raise ArgumentError(
            f"{name!r} is of a schedule, which says the rate of each step: find the rate for a step that is made with a plain "
            "number, and give it to the schedule then"
        )
    with_hyper(state, **{name: 1.0})
