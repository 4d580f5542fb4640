"""The search over a grid: trials handed out to workers, and taken in again by the calling thread alone."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import suppress
from typing import Any

from functrain.core.errors import ArgumentError, FunctrainError
from functrain.core.explain import Stage
from functrain.search.canonical import config_key
from functrain.search.grid import Grid
from functrain.search.hands import Hands, is_broken, received, submitting
from functrain.search.result import SearchResult, last_line
from functrain.search.standing import Standing, standing
from functrain.search.together import check_names, groups
from functrain.search.trial import Function, Member, Outcome, Trial

Progress = Callable[[int, int, Trial], None]


def grid_search(
    trial: Function,
    grid: Grid | Iterable[Mapping[str, Any]],
    *,
    workers: int | None = 1,
    executor: Executor | None = None,
    directory: str | os.PathLike[str] | None = None,
    maximize: bool | None = None,
    together: Sequence[str] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Try every config of a grid, and give the best.

    `trial(config)` returns a number, the score; or `Scored(score, state, measures)`; or an `Experiment`,
    which the search then trains to its end, evaluates after each epoch, and scores by the measure that
    its `score` names.

    - `workers`: threads, made for the call and joined before it returns (1: the calling thread; None: one
      for each processor). The threads inside torch's operations are divided among them.
    - `executor`: any `concurrent.futures.Executor` instead; it stays open. For processes, `trial` has to be
      something that pickles, such as a function at the top of a module; states come back as safetensors
      bytes.
    - `directory`: where finished trials are kept: `journal.jsonl` with a line for each, the best config
      in `best.json`, its state in `best.safetensors`. A second call in the same directory runs what is
      left, which is what is new in the grid, what was interrupted, and what failed.
    - `maximize`: whether larger scores are better; default: what the experiments say, and True for scores.
    - `together`: names of numbers that enter an experiment through its initial state alone
      (hyperparameters, initial params, seed): configs that differ only in these run as one population.
      This is checked first, and where it does not hold they run alone; `result.explain()` says why.
    - `progress(done, total, trial)`: called after each trial, in the calling thread.

    A trial that raises is recorded as failed, and the others go on. A score of nan is worse than any
    other; of equal scores the first in the grid is best. On KeyboardInterrupt no further trial begins,
    experiments stop at their next step (in threads; what processes have begun, they end), and the journal
    holds all that was finished.

    Raises `ArgumentError` for an empty grid and wrong arguments, `FunctrainError` when every trial failed
    or the executor broke, `RunError` when the directory is in use or damaged.

    >>> import functrain.search as fs
    >>> result = fs.grid_search(lambda config: -(config["x"] - 2) ** 2, fs.grid(x=[1, 2, 3]))
    >>> result.best, result.score, [t.config["x"] for t in result.trials]
    ({'x': 2}, 0.0, [2, 1, 3])
    """
    configs = grid if isinstance(grid, Grid) else Grid(grid)
    if not callable(trial):
        raise ArgumentError(f"trial must be a function of a config, got {type(trial).__name__}")
    if not len(configs):
        raise ArgumentError("the grid has no configs: there is nothing to search")
    if maximize not in (None, True, False):
        raise ArgumentError(f"maximize must be True, False or None, got {maximize!r}")
    members = [Member(place, config) for place, config in enumerate(configs)]
    check_names(members, together)
    with standing(directory, maximize) as known:
        left = [member for member in members if not known.finished(config_key(member.config))]
        search = _Search(known, len(members), len(members) - len(left), progress)
        tasks = groups(left, together)
        try:
            with submitting(trial, workers, executor) as hands:
                search.drive(deque(tasks), hands)
        except BaseException:
            search.rescue()
            raise
        return search.result(hands.name)


class _Search:
    """The coordinating side: hands groups out, takes outcomes in, and remembers the reasons."""

    def __init__(self, known: Standing, total: int, kept: int, progress: Progress | None) -> None:
        self.known, self.total, self.kept, self.progress = known, total, kept, progress
        self.finished = kept
        self.pending: dict[Future[Any], list[Member]] = {}
        self.arrived: deque[Outcome] = deque()
        self.together: list[tuple[str, list[Trial]]] = []
        self.alone: dict[str, list[Trial]] = {}

    def drive(self, tasks: deque[list[Member]], hands: Hands) -> None:
        """Run all tasks; members that cannot run together are handed out again, one by one."""
        pending = self.pending
        reasons: dict[int, str] = {}
        try:
            while tasks or pending:
                while tasks and (hands.width is None or len(pending) < hands.width):
                    members = tasks.popleft()
                    pending[hands.submit(members)] = members
                ready, _ = wait(pending, return_when=FIRST_COMPLETED)
                # What broke comes last: the others of its time are done, and are not to be lost with it.
                for future in sorted([future for future in pending if future in ready], key=is_broken):
                    report = received(future)
                    self.arrived.extend(report.outcomes)
                    del pending[future]
                    reasons |= {member.place: reason for member, reason in report.apart}
                    tasks.extendleft([member] for member, _ in reversed(report.apart))
                    self._take(reasons)
        finally:
            for future in pending:
                future.cancel()

    def rescue(self) -> None:
        """After an interruption or an error, put on record what had been finished besides, and tell nobody of it."""
        for future in self.pending:
            if future.done() and not is_broken(future):
                with suppress(Exception):
                    self.arrived.extend(received(future).outcomes)
        for outcome in self.arrived:
            # The first error is the one to be told; this may well be the same (a full disk).
            with suppress(Exception):
                self.known.add(outcome)

    def _take(self, reasons: dict[int, str]) -> None:
        joined: dict[str, list[Trial]] = {}
        while self.arrived:
            trial = self.arrived[0].trial
            self.known.add(self.arrived[0])
            self.arrived.popleft()
            if trial.how == "alone":
                self.alone.setdefault(reasons.get(trial.place, ""), []).append(trial)
            else:
                joined.setdefault(trial.how, []).append(trial)
            self.finished += 1
            if self.progress is not None:
                self.progress(self.finished, self.total, trial)
        self.together.extend(joined.items())

    def result(self, hands: str) -> SearchResult:
        """The result; raises `FunctrainError` when no trial came to its end."""
        trials = self.known.sorted()
        if self.known.best is None:
            first = last_line(trials[0].error or "")
            raise FunctrainError(
                f"all {len(trials)} trials failed, {trials[0].config} with {first}: run trial(config) by itself to see where"
            )
        best = self.known.trials[self.known.best]
        return SearchResult(best.config, best.score, self.known.state, trials, self._stage(hands))

    def _stage(self, hands: str) -> Stage:
        facts = {
            "configs": str(self.total),
            "run by": hands,
            "larger is better": str(self.known.maximize is not False),
        }
        if self.kept:
            facts["kept from the journal"] = f"{self.kept} trials"
        inner = [Stage(how, {"of": _shared(trials), "why": _WHY_TOGETHER}) for how, trials in self.together]
        for reason, trials in self.alone.items():
            named = ", ".join(str(trial.config) for trial in trials[:3]) + (" …" if len(trials) > 3 else "")
            inner.append(Stage(f"{len(trials)} alone", {"of": named, **({"why": reason} if reason else {})}))
        return Stage("grid search", facts, inner)


_WHY_TOGETHER = "members differ only in numbers of the state; the first step is that of each alone"


def _shared(trials: list[Trial]) -> str:
    first = trials[0].config
    same = {name: value for name, value in first.items() if all(trial.config.get(name) == value for trial in trials)}
    varied = ", ".join(name for name in first if name not in same)
    return f"{same} with {varied} varied" if same else f"{varied} varied"
