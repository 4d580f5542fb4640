"""The training loop: an experiment run in a directory, to its end or to an interruption, from wherever it stands."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from functrain.core.errors import ArgumentError, RunError
from functrain.core.step import Metrics
from functrain.core.tree import quoted
from functrain.data.prefetch import prefetch
from functrain.engine.experiment import Experiment
from functrain.engine.fold import fold, position
from functrain.runs.directory import Run
from functrain.runs.events import EpochEnded, Event, Saved, Started, Stepped
from functrain.runs.store import hash_tree, named_leaves
from functrain.search.measures import measured

Observer = Callable[[Event], None]


class Trained(NamedTuple):
    """How a run stands: its state, the rows logged in all, and whether it was interrupted before its end."""

    state: Any
    rows: list[dict[str, Any]]
    interrupted: bool


def train(
    experiment: Experiment,
    run: Run,
    *,
    every: int | None = None,
    observers: Sequence[Observer] = (),
    interrupted: Callable[[], bool] = lambda: False,
) -> Trained:
    """Run `experiment` in the directory `run`: from its newest whole checkpoint on, or from the beginning.

    A row of metrics is logged after each epoch: `epoch`, `position`, `seconds`, `train/…` (means over the epoch's examples,
    whatever the sizes of its batches) and what `experiment.evaluate` measures, under other names. Steps that `ft.guard` has
    skipped are left out of the means, and counted as `train/skipped`. The state is checkpointed before the first step, every
    `every` steps, after each epoch (also when `evaluate` fails: called again, training goes on with that), and when
    interrupted; but never one whose params or carry have become nan or infinite.

    `interrupted` is asked after every step: when it says so, the state is checkpointed and the loop ends. Killed at any
    moment and called again, it ends with the same parameters, bit for bit, as if nothing had happened.

    Raises `RunError` when another process trains in the directory, the checkpoint is of another experiment, or a
    loss, a parameter or the carry is not finite; `ArgumentError` when `evaluate` gives anything but numbers by name.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ArgumentError(f"every must be a number of steps of at least 1, got {every!r}")
    with run.locked():
        return _Loop(experiment, run, every, observers, interrupted).run()


class _Loop:
    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        every: int | None,
        observers: Sequence[Observer],
        interrupted: Callable[[], bool],
    ) -> None:
        self.experiment, self.directory, self.every = experiment, run, every
        self.observers, self.interrupted = observers, interrupted
        # In positions, as a state counts.
        self.takes = experiment.step.takes
        self.length = len(experiment.train) * self.takes
        self.sums = _EpochSums({})
        self.initial = ""
        self.never_finite: set[str] = set()

    def run(self) -> Trained:
        state, skipped = self._start()
        self._tell(Started(position(state), self.experiment.steps, self.length, skipped))
        if not self.directory.checkpoints.positions():
            self._save(state, 0, time.perf_counter())
        if self._unmeasured(position(state)):
            self._close(state, position(state), time.perf_counter())
        stopped = position(state) < self.experiment.steps and self.interrupted()
        with self._batches() as batches:
            while position(state) < self.experiment.steps and not stopped:
                state, stopped = self._epoch(state, batches)
        return Trained(state, self.directory.rows(), stopped)

    def _start(self) -> tuple[Any, list[str]]:
        initial = self.experiment.initial()
        self.initial = hash_tree(initial)
        self.never_finite = set(_not_finite(initial))
        known = self.directory.checkpoints
        if not known.positions():
            self.directory.truncate(-1)
            return initial, []
        loaded = known.load(initial)
        if loaded.record.get("initial") != self.initial:
            raise RunError(
                f"the run in {self.directory.path} began from another initial state than this experiment has (params, carry, "
                "seed or the optimizer's numbers): its program, config or data have changed; train anew in another directory"
            )
        self.sums = _EpochSums(loaded.record["sums"])
        self.directory.truncate(loaded.position - self._unmeasured(loaded.position))
        return loaded.state, loaded.skipped

    def _unmeasured(self, done: int) -> bool:
        """Whether the epoch that ends here has no row yet: `evaluate` failed."""
        return bool(self.sums.sums) and done % self.length == 0

    def _batches(self) -> Any:
        source = self.experiment.train
        return prefetch(source, self.experiment.depth) if self.experiment.depth else nullcontext(source)

    def _epoch(self, state: Any, batches: Any) -> tuple[Any, bool]:
        begun = time.perf_counter()
        first = position(state)
        rest = self.length - first % self.length
        steps = fold(self.experiment.step, state, batches, steps=rest)
        for count, (state, metrics) in enumerate(steps, 1):
            done = first + count * self.takes
            for before, row in enumerate(_rows(metrics, self.takes), 1 - self.takes):
                self.sums.add(done + before, row)
            self._tell(Stepped(done, metrics))
            inside = done < first + rest
            if inside and self.interrupted():
                self._save(state, done, begun)
                return state, True
            if inside and self.every and done // self.every > (done - self.takes) // self.every:
                self._save(state, done, begun)
        self._close(state, first + rest, begun)
        return state, first + rest < self.experiment.steps and self.interrupted()

    def _close(self, state: Any, done: int, begun: float) -> None:
        row: dict[str, Any] = {"epoch": done // self.length, "position": done} | self.sums.row()
        self._check(state, done)
        try:
            row |= self._measures(state, [*row, "seconds"])
        except Exception:
            # The epoch is not to be lost with its row, which is made up for when training goes on from here.
            self._save(state, done, begun)
            raise
        row["seconds"] = self.sums.seconds + time.perf_counter() - begun
        # The row first: killed in between, the epoch is done again and its row is written again, once.
        self.directory.log(row)
        self.sums = _EpochSums({})
        self._save(state, done, time.perf_counter())
        self._tell(EpochEnded(row))

    def _measures(self, state: Any, taken: list[str]) -> dict[str, float]:
        if self.experiment.evaluate is None:
            return {}
        found = measured(self.experiment.evaluate, state)
        both = [name for name in found if name in taken]
        if both:
            raise ArgumentError(
                f"evaluate gives {', '.join(quoted(both))}, which each row of metrics has already: give the measure another "
                "name, such as 'test/loss'"
            )
        score = self.experiment.score
        if score is not None and score not in found:
            raise ArgumentError(f"the experiment's score is {score!r}, and evaluate gives {', '.join(quoted(found))}")
        return found

    def _check(self, state: Any, done: int) -> None:
        """Raise `RunError` where a state is not worth keeping: going on from it would fail in the same way for ever."""
        bad = [name for name in _not_finite(state) if name not in self.never_finite]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            newest = self.directory.checkpoints.newest()
            raise RunError(
                f"after step {done}, {', '.join(bad[:5])}{more} hold nan or inf, though the loss is finite: this was not "
                f"saved, and the newest whole checkpoint, of position {newest}, is from before. Look for a gradient that is "
                "not finite (the square root of 0, a division by 0), or lower the learning rate; then resume the run"
            )

    def _save(self, state: Any, done: int, begun: float) -> None:
        sums = self.sums.record(time.perf_counter() - begun)
        self._check(state, done)
        self.directory.checkpoints.save(state, done, {"initial": self.initial, "sums": sums})
        self._tell(Saved(done))

    def _tell(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)


def _not_finite(state: Any) -> list[str]:
    """The names of the leaves of params and carry that hold nan or inf."""
    named = named_leaves({"params": getattr(state, "params", None), "carry": getattr(state, "carry", None)})
    return [name for name, leaf in named.items() if not _finite(leaf)]


def _finite(leaf: Tensor) -> bool:
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return True
    # Numbers of one byte have no arithmetic.
    return bool((leaf.float() if leaf.itemsize == 1 else leaf).isfinite().all())


def _rows(metrics: Metrics, takes: int) -> list[Metrics]:
    """The metrics of each of the steps that an update took; what a step around them all measured, it did for each."""
    if takes == 1:
        return [metrics]
    each = {name: value.expand(takes) if value.ndim == 0 else value for name, value in metrics.items()}
    return [{name: value[place] for name, value in each.items()} for place in range(takes)]


class _EpochSums:
    """Weighted sums of an epoch's metrics, which a checkpoint in its middle takes along."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.sums: dict[str, float] = dict(record.get("sums", {}))
        self.weight: float = record.get("weight", 0.0)
        self.seconds: float = record.get("seconds", 0.0)
        self.waiting: list[tuple[int, Metrics]] = []

    def add(self, done: int, metrics: Metrics) -> None:
        self.waiting.append((done, metrics))
        # Reading a number waits for the device: not at every step.
        if len(self.waiting) >= 64:
            self._drain()

    def _drain(self) -> None:
        for done, metrics in self.waiting:
            weight, loss = float(metrics["weight"]), float(metrics["loss"])
            skipped = float(metrics.get("skipped", 0.0))
            if not math.isfinite(loss) and not skipped:
                why = "look at that batch, and at the gradient of the step before, or lower the learning rate"
                raise RunError(
                    f"the loss is {loss} at step {done} (the batch of position {done - 1}); the newest checkpoint is "
                    f"from before: {why if weight else 'the weights of that batch are all 0'}"
                )
            self.weight += 0.0 if skipped else weight
            for name, value in metrics.items():
                if name != "weight":
                    # Skipped steps are counted (tbptt's by the share of their windows); what they measured may well be nan.
                    share = skipped if name == "skipped" else 0.0 if skipped else weight * float(value)
                    self.sums[name] = self.sums.get(name, 0.0) + share
        self.waiting = []

    def row(self) -> dict[str, float]:
        self._drain()
        # A weight of 0 is fine for sums, which are not divided by it.
        means = {name: total / self.weight if self.weight else math.nan for name, total in self.sums.items()}
        counts = {name: total for name, total in self.sums.items() if name == "skipped"}
        return {f"train/{name}": value for name, value in {**means, **counts}.items()}

    def record(self, seconds: float) -> dict[str, Any]:
        self._drain()
        return {"sums": dict(self.sums), "weight": self.weight, "seconds": self.seconds + seconds}


@contextmanager
def interruptible(notice: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only set a flag, which the function given tells; a second SIGINT raises.

    `notice` is called when the flag is set. Only the main thread can catch signals: elsewhere the flag is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if len(caught) == 1:
            notice()

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
