"""The search over a grid: trials handed out to workers, and taken in again by the calling thread alone."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from functrain.core.errors import ArgumentError, FunctrainError
from functrain.core.explain import Stage
from functrain.engine.workers import checked_workers, intra_op_threads
from functrain.search.canonical import config_key
from functrain.search.grid import Grid
from functrain.search.keep import pack, unpack
from functrain.search.result import SearchResult, last_line
from functrain.search.standing import Standing, standing
from functrain.search.together import Report, check_names, groups, run_together
from functrain.search.trial import Function, Member, Outcome, Trial, halted_by, run_alone

Progress = Callable[[int, int, Trial], None]
Work = Callable[[Sequence[Member]], Report]


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
    experiments stop at their next step, and the journal holds all that was finished.

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
        with _submitting(trial, workers, executor) as hands:
            search.drive(deque(tasks), hands)
        return search.result(hands.name)


class _Hands(NamedTuple):
    """Who does the work: `submit` hands a group over, at most `width` of them at once."""

    submit: Callable[..., Future[Any]]
    width: int | None
    name: str


@contextmanager
def _submitting(trial: Function, workers: int | None, executor: Executor | None) -> Iterator[_Hands]:
    if executor is not None:
        if not isinstance(executor, Executor):
            raise ArgumentError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}")
        if workers != 1:
            raise ArgumentError(f"an executor brings its own workers: leave workers={workers} out")
        work: Work = partial(_work if isinstance(executor, ThreadPoolExecutor) else _packed, trial)
        yield _Hands(lambda members: executor.submit(work, members), None, type(executor).__name__)
        return
    count = checked_workers(workers)
    if count == 1:
        yield _Hands(partial(_here, partial(_work, trial)), 1, "the calling thread")
        return
    # Never more threads in all than there were: threads times intra-op threads would oversubscribe.
    share = max(1, torch.get_num_threads() // count)
    stop = threading.Event()
    name = f"{count} threads, {share} inside an operation each"
    with intra_op_threads(torch.get_num_threads()):
        pool = ThreadPoolExecutor(count, "functrain-trial", torch.set_num_threads, (share,))
        inside = _with_settings(partial(_work, trial, stop=stop))
        try:
            yield _Hands(lambda members: pool.submit(inside, members), count, name)
        except BaseException as error:
            stop.set()
            # A trial that is no experiment cannot be stopped: waiting for it would hold an interrupt back.
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
        pool.shutdown()


def _work(trial: Function, members: Sequence[Member], stop: threading.Event | None = None) -> Report:
    halt = halted_by(stop)
    if len(members) == 1:
        return Report([run_alone(trial, members[0], halt)], [])
    return run_together(trial, members, halt)


def _packed(trial: Function, members: Sequence[Member]) -> Report:
    # Tensors would travel as handles of shared memory, which die with their process: bytes do not.
    report = _work(trial, members)
    outcomes = [out if out.state is None else out._replace(state=pack(out.state)) for out in report.outcomes]
    return report._replace(outcomes=outcomes)


def _here(work: Work, members: Sequence[Member]) -> Future[Report]:
    future: Future[Report] = Future()
    future.set_result(work(members))
    return future


def _with_settings(work: Work) -> Work:
    # A new thread starts with torch's defaults: none of the caller's settings reach it by themselves.
    grad_mode = torch.is_grad_enabled()
    autocast = (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )

    def inside(members: Sequence[Member]) -> Report:
        with (
            torch.set_grad_enabled(grad_mode),
            torch.autocast("cpu", dtype=autocast[1], enabled=autocast[0], cache_enabled=autocast[2]),
        ):
            return work(members)

    return inside


class _Search:
    """The coordinating side: hands groups out, takes outcomes in, and remembers the reasons."""

    def __init__(self, known: Standing, total: int, kept: int, progress: Progress | None) -> None:
        self.known, self.total, self.kept, self.progress = known, total, kept, progress
        self.finished = kept
        self.together: list[tuple[str, list[Trial]]] = []
        self.alone: dict[str, list[Trial]] = {}

    def drive(self, tasks: deque[list[Member]], hands: _Hands) -> None:
        """Run all tasks; members that cannot run together are handed out again, one by one."""
        pending: dict[Future[Any], list[Member]] = {}
        reasons: dict[int, str] = {}
        try:
            while tasks or pending:
                while tasks and (hands.width is None or len(pending) < hands.width):
                    members = tasks.popleft()
                    pending[_handed(hands.submit, members)] = members
                ready, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in [future for future in pending if future in ready]:
                    del pending[future]
                    report = self._received(future)
                    reasons |= {member.place: reason for member, reason in report.apart}
                    tasks.extendleft([member] for member, _ in reversed(report.apart))
                    self._take(report.outcomes, reasons)
        finally:
            for future in pending:
                future.cancel()

    def _received(self, future: Future[Any]) -> Report:
        try:
            report: Report = future.result()
        except Exception as error:
            raise _broken(error) from error
        opened = [
            out._replace(state=unpack(out.state).state) if isinstance(out.state, bytes) else out for out in report.outcomes
        ]
        return report._replace(outcomes=opened)

    def _take(self, outcomes: list[Outcome], reasons: dict[int, str]) -> None:
        joined: dict[str, list[Trial]] = {}
        for outcome in outcomes:
            trial = outcome.trial
            self.known.add(outcome)
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


def _handed(submit: Callable[..., Future[Any]], members: list[Member]) -> Future[Any]:
    try:
        return submit(members)
    except RuntimeError as error:
        raise _broken(error) from error


def _broken(error: BaseException) -> FunctrainError:
    return FunctrainError(
        f"the executor did not do its work ({type(error).__name__}: {error}): a worker died, it was shut "
        "down, or the trial does not pickle (processes need a function at the top of a module). What was "
        "finished is in the directory, where one was given: a call with a working executor goes on from there"
    )
