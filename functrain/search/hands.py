"""Who does the work of a search: the calling thread, threads made for it, or an executor of the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from functrain.core.errors import ArgumentError, FunctrainError
from functrain.engine.workers import checked_workers, intra_op_threads
from functrain.search.keep import pack, unpack
from functrain.search.together import Report, run_together
from functrain.search.trial import Function, Member, halted_by, run_alone

Work = Callable[[Sequence[Member]], Report]


class Hands(NamedTuple):
    """Who does the work: `submit` hands a group over, at most `width` of them at once."""

    submit: Callable[..., Future[Any]]
    width: int | None
    name: str


@contextmanager
def submitting(trial: Function, workers: int | None, executor: Executor | None) -> Iterator[Hands]:
    """Who works within the block; when it ends in an error, experiments in threads stop at their next step."""
    if executor is not None:
        if not isinstance(executor, Executor):
            raise ArgumentError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}")
        if workers != 1:
            raise ArgumentError(f"an executor brings its own workers: leave workers={workers} out")
        halted = threading.Event()
        threads = isinstance(executor, ThreadPoolExecutor)
        work: Work = partial(_work, trial, stop=halted) if threads else partial(_packed, trial)
        try:
            yield Hands(partial(_handed, executor, work), None, type(executor).__name__)
        finally:
            halted.set()
        return
    count = checked_workers(workers)
    if count == 1:
        yield Hands(partial(_here, partial(_work, trial)), 1, "the calling thread")
        return
    # Never more threads in all than there were: threads times intra-op threads would oversubscribe.
    share = max(1, torch.get_num_threads() // count)
    stop = threading.Event()
    name = f"{count} threads, {share} inside an operation each"
    with intra_op_threads(torch.get_num_threads()):
        pool = ThreadPoolExecutor(count, "functrain-trial", torch.set_num_threads, (share,))
        inside = _with_settings(partial(_work, trial, stop=stop))
        try:
            yield Hands(lambda members: pool.submit(inside, members), count, name)
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


def _handed(executor: Executor, work: Work, members: list[Member]) -> Future[Any]:
    try:
        return executor.submit(work, members)
    except RuntimeError as error:
        raise _broken(error) from error


def is_broken(future: Future[Any]) -> bool:
    """Whether a future that is done has no report."""
    return future.cancelled() or future.exception() is not None


def received(future: Future[Any]) -> Report:
    """The report of a future that is done; raises `FunctrainError` when its worker, and no trial, failed."""
    try:
        report: Report = future.result()
    except Exception as error:
        raise _broken(error) from error
    opened = [out._replace(state=unpack(out.state).state) if isinstance(out.state, bytes) else out for out in report.outcomes]
    return report._replace(outcomes=opened)


def _broken(error: BaseException) -> FunctrainError:
    return FunctrainError(
        f"the executor did not do its work ({type(error).__name__}: {error}): a worker died, it was shut "
        "down, or the trial does not pickle (processes need a function at the top of a module). What was "
        "finished is in the directory, where one was given: a call with a working executor goes on from there"
    )
