"""Which plan is fastest here: parts × plan × workers, measured on real batches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.deferred import Deferred
from functrain.core.errors import ArgumentError
from functrain.core.explain import explain
from functrain.core.step import Step, check_owned
from functrain.core.tree import Tree
from functrain.data.source import Source
from functrain.engine.candidates import PLANS, Candidate, candidates, titles
from functrain.engine.fold import position

# Seconds: a clock says little about less, so quick steps are taken several times a turn.
_TURN = 0.01


class Timing(NamedTuple):
    """How long a step takes by one plan.

    - `how`, `parts`, `workers`: the plan; `plain` is a gradient that is not cut;
    - `seconds`, `low`, `high`: the median over the rounds and its quartiles; infinite where it did not run;
    - `ratio`: its time / that of the step as given, the median over the rounds; not a number where one did not run;
    - `note`: which is the step as given, which was taken, and why one did not run.
    """

    how: str
    parts: int
    workers: int
    seconds: float
    low: float
    high: float
    ratio: float
    note: str


@dataclass(frozen=True)
class Tuned:
    """What `tune` returns: the fastest `step`, and a row for each plan; `str` is the table."""

    step: Step
    rows: tuple[Timing, ...]

    def __str__(self) -> str:
        table = [("plan", "parts", "workers", "ms a step", "quartiles", "ratio", ""), *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        # Words to the left, figures to the right.
        sides = "<>>>>><"
        lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in table)
        return "\n".join(line.rstrip() for line in lines)


def _cells(row: Timing) -> tuple[str, ...]:
    workers = str(row.workers) if row.how == "threads" else ""
    if math.isinf(row.seconds):
        return row.how, str(row.parts), workers, "", "", "", row.note
    spread = f"{row.low * 1e3:.3f} to {row.high * 1e3:.3f}"
    ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
    return row.how, str(row.parts), workers, f"{row.seconds * 1e3:.3f}", spread, ratio, row.note


def tune(
    step: Step,
    state: Any,
    source: Source,
    *,
    parts: int | Iterable[int] | None = None,
    plans: str | Iterable[str] | None = None,
    workers: int | Iterable[int] | None = None,
    steps: int = 5,
    show: Callable[[str], object] | None = print,
) -> Tuned:
    """The step by the plan that is fastest here: parts × plan × workers, timed on batches of `source`.

    Takes a `step` of any gradient, cut (`ft.parallel`) or not, compiled or not, and gives it back, or the same step by
    another plan. `state` says where it starts; it is copied, never changed or given away.

    What may be varied is decided by algebra. Where one backward pass over the whole batch is the sum over its parts,
    results agree up to rounding whatever the number of parts is. Elsewhere it belongs to the mathematics (a median over 8
    parts is not one over 4, nor is batch norm), or to the bits (`exact=True`): then parts stay as they are, unless
    `parts` asks for others. Reducer, `exact` and budget stay in any case. A plan whose loss is not the step's (a loss
    that looks at batch-mates, or draws from torch's global generator) is not taken.

    - `parts`: numbers of parts; default: 1, 2, 4, 8, 16 as far as the batch goes, and the step's own;
    - `plans`: of `fused`, `loop`, `threads`, `vmap`; default: all. In a compiled step threads are looped, and each plan
      is compiled first;
    - `workers`: for the plan `threads`; default: 2, 4, 8, … and the number of processors;
    - `steps`: rounds. In each round every plan takes a turn on the same batch, in an order that rotates: one step, or
      as many as 10 ms hold. Reading a batch is not timed, unless its parts are drawn by workers (`Deferred`);
    - `show`: what the table is given to, once; None: nothing.

    A plan that is refused or fails is a row with the reason. Where the quartiles of plans overlap with those of the
    fastest, the simplest of them is taken: the step's own plan, else fewer workers, then fewer parts.

    Raises `ArgumentError` for a source without batches, fewer than one step, a step that is not made of a gradient; and
    the step's own error when nothing runs at all.

    >>> import functrain as ft
    >>> step = ft.step(ft.parallel(ft.grad(lambda params, batch: (batch @ params) ** 2), 2), ft.optim.sgd(0.1))
    >>> tuned = ft.tune(step, step.init(torch.ones(3)), ft.arrays(torch.ones(8, 3)).batch(4), parts=2, workers=1, show=None)
    >>> [(row.how, row.parts) for row in tuned.rows]
    [('fused', 2), ('loop', 2), ('vmap', 2)]
    """
    _check(step, state, source, steps)
    step.remade(step.grad)
    names = _chosen(plans, PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        raise ArgumentError(f"plans are {', '.join(PLANS)}, got {', '.join(map(repr, unknown))}")
    numbers, counts = _numbers("parts", parts), _numbers("workers", workers)
    batches = _batches(source, position(state), steps)
    runners = [_Runner(plan, plan.reason) for plan in candidates(step, names, numbers, counts, _size(step, batches[0]))]
    _measure(runners, state, batches, steps)
    given = runners[0]
    if not any(runner.times for runner in runners):
        assert given.error is not None
        raise given.error
    fastest = _fastest(runners)
    assert fastest.plan.step is not None
    tuned = Tuned(fastest.plan.step, tuple(runner.row(given, fastest) for runner in runners))
    if show is not None:
        show(str(tuned))
    return tuned


# --- what is asked for ------------------------------------------------------------------------------------------------


def _check(step: Step, state: Any, source: Source, steps: int) -> None:
    order = "write ft.tune(step, state, source)"
    if not isinstance(step, Step):
        raise ArgumentError(f"tune takes a step, got {explain(step).title}: {order}")
    if not isinstance(source, Source):
        raise ArgumentError(f"tune measures on a source of batches, got {type(source).__name__}: {order}")
    check_owned(state)
    if source.length == 0:
        raise ArgumentError("the source has no batches: there is nothing to measure on")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps must be an int of at least 1, got {steps!r}")


def _chosen(given: Any, default: Sequence[Any]) -> list[Any]:
    single = isinstance(given, str) or not isinstance(given, Iterable)
    chosen = list(default) if given is None else [given] if single else list(given)
    if not chosen:
        raise ArgumentError("parts, plans and workers say what to measure (None: the default), got an empty list")
    return list(dict.fromkeys(chosen))


def _numbers(name: str, given: int | Iterable[int] | None) -> list[int] | None:
    if given is None:
        return None
    numbers = _chosen(given, ())
    if wrong := [number for number in numbers if isinstance(number, bool) or not isinstance(number, int) or number < 1]:
        raise ArgumentError(f"{name} must be ints of at least 1, got {wrong[0]!r}")
    return numbers


def _batches(source: Source, start: int, steps: int) -> list[Tree]:
    """The next batches from a position on, at most `steps`: those of the first one's shapes, so that rounds compare."""
    endless = source if source.length is None else source.repeat()
    count = steps if source.length is None else min(steps, source.length)
    batches = [endless(start + number) for number in range(count)]
    return [batch for batch in batches if _shapes(batch) == _shapes(batches[0])]


def _shapes(batch: Tree) -> list[tuple[int, ...]]:
    return [(leaf.size,) if isinstance(leaf, Deferred) else tuple(leaf.shape) for leaf in tree.leaves(batch)]


def _size(step: Step, batch: Tree) -> int | None:
    """How many examples a gradient is given: more parts than that are none. None where a batch has another form."""
    stacked = any(title.startswith("repeat") for title in titles(explain(step)))
    sizes = {shape[stacked] for shape in _shapes(batch) if len(shape) > stacked}
    return min(sizes, default=None)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class _Runner:
    """A plan that is measured, and what came of it."""

    plan: Candidate
    note: str
    error: Exception | None = None
    loss: Tensor | None = None
    calls: int = 1
    times: list[float] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.plan.step is not None and self.error is None

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile; infinite where it did not run."""
        if len(self.times) < 2:
            return ((self.times or [math.inf])[0],) * 3
        low, middle, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, middle, high

    def row(self, given: _Runner, fastest: _Runner) -> Timing:
        how, parts, workers, *_ = self.plan
        low, middle, high = self.quartiles()
        ratios = [mine / theirs for mine, theirs in zip(self.times, given.times)]
        notes = ["as given"] * (self is given) + [self.note] * bool(self.note) + ["taken"] * (self is fastest)
        ratio = statistics.median(ratios) if ratios else math.nan
        return Timing(how, parts, workers, middle, low, high, ratio, ", ".join(notes))

    def tried(self, work: Callable[[Any, Tree], None], state: Any, batch: Tree) -> None:
        """Do `work` unless it has failed before; failing is a result like any other."""
        if not self.running:
            return
        try:
            work(state, batch)
        except Exception as error:
            told = str(error).strip().split("\n")[0]
            self.fail(error, f"{type(error).__name__}: {told}" if told else type(error).__name__)

    def fail(self, error: Exception, note: str) -> None:
        self.error, self.note, self.times = error, note, []

    def warm(self, state: Any, batch: Tree) -> None:
        # The first step compiles, allocates and picks kernels; the second says how long one takes.
        assert self.plan.step is not None
        _, metrics = self.plan.step(tree.map(torch.clone, state), batch)
        self.loss = metrics.get("loss")
        self.calls = max(1, round(_TURN / self._seconds(state, batch, 1)))

    def timed(self, state: Any, batch: Tree) -> None:
        self.times.append(self._seconds(state, batch, self.calls) / self.calls)

    def _seconds(self, state: Any, batch: Tree, calls: int) -> float:
        assert self.plan.step is not None
        own = tree.map(torch.clone, state)
        device = own.position.device
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            own, _ = self.plan.step(own, batch)
        _wait(device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _measure(runners: list[_Runner], state: Any, batches: list[Tree], steps: int) -> None:
    for runner in runners:
        runner.tried(runner.warm, state, batches[0])
    expected = next((runner.loss for runner in runners if runner.loss is not None), None)
    for runner in runners:
        if runner.plan.alike and runner.loss is not None and expected is not None:
            _agree(runner, runner.loss, expected)
    for number in range(steps):
        # The order rotates with the round: nobody always runs after the same one.
        turn = number % len(runners)
        for runner in runners[turn:] + runners[:turn]:
            runner.tried(runner.timed, state, batches[number % len(batches)])


def _agree(runner: _Runner, loss: Tensor, expected: Tensor) -> None:
    tolerance = max(0.01, 4 * torch.finfo(loss.dtype).eps)
    if not torch.allclose(loss, expected, rtol=tolerance, atol=1e-5, equal_nan=True):
        figures = f"{float(loss.mean()):.4g} instead of {float(expected.mean()):.4g}"
        reason = f"another loss, {figures}: it does not add up over parts, or draws from a global generator"
        runner.fail(ArgumentError(reason), reason)


def _fastest(runners: list[_Runner]) -> _Runner:
    """The fastest, or the simplest of those whose quartiles overlap with its own."""
    ran = [runner for runner in runners if runner.times]
    high = min((runner.quartiles() for runner in ran), key=lambda quartiles: quartiles[1])[2]
    level = [runner for runner in ran if runner.quartiles()[0] <= high]

    def simplicity(runner: _Runner) -> tuple[bool, int, int]:
        how, parts, workers, *_ = runner.plan
        return runner is not runners[0], workers, 1 if how == "fused" else parts

    return min(level, key=simplicity)
