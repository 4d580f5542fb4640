"""Searches by threads, processes, and whatever else runs functions: the same results."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import trials

import functrain as ft
from functrain.core.errors import ArgumentError, FunctrainError
from functrain.search import grid, grid_search
from functrain.search.keep import unpack


def spawned(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def test_every_way_to_run_gives_the_same(tmp_path: Path) -> None:
    over = grid(x=range(6))
    alone = grid_search(trials.kept, over)
    with spawned(2) as processes, ThreadPoolExecutor(2) as pool:
        ways: list[dict[str, Any]] = [{"workers": 3}, {"workers": None}, {"executor": pool}, {"executor": processes}]
        for number, way in enumerate(ways):
            result = grid_search(trials.kept, over, directory=tmp_path / str(number), **way)
            assert result.best == alone.best == {"x": 3}
            assert [trial._replace(seconds=0) for trial in result.trials] == [
                trial._replace(seconds=0) for trial in alone.trials
            ]
            assert ft.tree.map(torch.equal, result.state, alone.state) == {"w": True, "half": True}
            stored = unpack((tmp_path / str(number) / "best.safetensors").read_bytes()).state
            assert torch.equal(stored["half"], alone.state["half"])
        assert pool.submit(int, "3").result() == 3


def test_experiments_run_in_processes() -> None:
    over = grid(lr=[0.1, 0.2], start=[0, 1])
    alone = grid_search(trials.line, over, together=("lr", "start"))
    with spawned(1) as pool:
        there = grid_search(trials.line, over, together=("lr", "start"), executor=pool)
    assert {trial.how for trial in there.trials} == {"population of 4"}
    assert there.score == pytest.approx(alone.score)
    assert type(there.state) is ft.State


def test_intra_op_threads_are_divided_and_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        shared = grid_search(trials.threads, grid(x=range(4)), workers=2)
        assert {trial.score for trial in shared.trials} == {2.0}
        assert grid_search(trials.threads, grid(x=1)).score == 4.0
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert not any(name.startswith("functrain-trial") for name in trials.names())


def test_the_callers_settings_reach_the_threads() -> None:
    def trial(config: dict[str, Any]) -> float:
        return float(torch.is_grad_enabled()) + 2 * torch.is_autocast_enabled("cpu")

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert grid_search(trial, grid(x=1), workers=2).score == 2.0


def test_a_trial_that_cannot_be_sent_says_so() -> None:
    with spawned(1) as pool, pytest.raises(FunctrainError, match="does not pickle"):
        grid_search(lambda config: 1.0, grid(x=1), executor=pool)


def test_a_process_that_dies_costs_no_finished_trial(tmp_path: Path) -> None:
    over = grid(x=range(4))
    with spawned(1) as pool, pytest.raises(FunctrainError, match="a worker died"):
        grid_search(trials.killed, over, executor=pool, directory=tmp_path)
    told: list[int] = []
    result = grid_search(trials.parabola, over, directory=tmp_path, progress=lambda done, total, trial: told.append(done))
    assert told == [3, 4]
    assert result.best == {"x": 3}


class AtOnce(Executor):
    """Runs what it is given at once, and breaks at the given numbers."""

    def __init__(self, *breaks: int) -> None:
        self.breaks, self.given = breaks, 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        future: Future[Any] = Future()
        if self.given in self.breaks:
            future.set_exception(BrokenExecutor("gone"))
        else:
            future.set_result(fn(*args, **kwargs))
        self.given += 1
        return future


def lines(directory: Path) -> list[str]:
    return (directory / "journal.jsonl").read_text().splitlines()


def test_what_was_done_beside_a_worker_that_died_is_kept(tmp_path: Path) -> None:
    told: list[int] = []
    tell = lambda done, total, trial: told.append(done)  # noqa: E731
    with pytest.raises(FunctrainError, match="a worker died"):
        grid_search(trials.kept, grid(x=range(6)), executor=AtOnce(0, 3), directory=tmp_path, progress=tell)
    assert len(lines(tmp_path)) == 4
    assert told == [1, 2, 3, 4]


def test_what_was_done_when_an_interrupt_came_is_kept(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, trial: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        grid_search(trials.kept, grid(x=range(6)), executor=AtOnce(), directory=tmp_path / "a", progress=interrupt)
    assert len(lines(tmp_path / "a")) == 6
    again = grid_search(trials.counted, grid(x=range(6)), directory=tmp_path / "a")
    assert again.best == {"x": 3}
    assert again.state["w"].tolist() == [3, 3]


@pytest.mark.parametrize("own", [True, False])
def test_what_threads_do_while_the_search_fails_is_kept(tmp_path: Path, own: bool) -> None:
    all_run = threading.Barrier(3)

    def trial(config: dict[str, Any]) -> float:
        all_run.wait(timeout=30)
        return float(config["x"])

    def fails(done: int, total: int, trial: Any) -> None:
        raise OSError("no more paper")

    pool = ThreadPoolExecutor(3)
    how: dict[str, Any] = {"workers": 3} if own else {"executor": pool}
    with pool, pytest.raises(OSError, match="no more paper"):
        grid_search(trial, grid(x=range(3)), directory=tmp_path, progress=fails, **how)
    # Threads of its own are waited for.
    assert len(lines(tmp_path)) == 3 if own else len(lines(tmp_path)) >= 1


def test_an_executor_has_its_own_workers() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ArgumentError, match="leave workers=2 out"):
        grid_search(trials.parabola, grid(x=1), executor=pool, workers=2)


def test_an_executor_may_be_anything() -> None:
    assert grid_search(trials.kept, grid(x=[1, 3]), executor=AtOnce()).state["w"].tolist() == [3, 3]
