"""Searches that are interrupted or killed, and called again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trials

from functrain.search import grid, grid_search

HERE = Path(__file__).parent


PROGRAM = """
import sys, functrain as ft, trials
from functrain.search import grid, grid_search
try:
    grid_search(trials.{trial}, {over}, workers={workers}, directory=sys.argv[1], together={together})
except KeyboardInterrupt:
    print("interrupted", flush=True)
{after}
"""
QUIT = "import os; os._exit(0)  # the opaque trial never ends"


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupt_reaches_the_caller_and_keeps_the_journal(tmp_path: Path, workers: int) -> None:
    text = PROGRAM.format(trial="forever", over="grid(x=[0, 1, 2, 3])", workers=workers, together=(), after=QUIT)
    done = subprocess.run([sys.executable, "-c", text, str(tmp_path)], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n", done.stderr
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert all(record["status"] == "done" and record["config"] == {"x": 0} for record in records)
    assert workers > 1 or len(records) == 1


def test_experiments_stop_at_their_next_step_so_that_the_program_can_end(tmp_path: Path) -> None:
    after = "import threading; [t.join() for t in threading.enumerate() if 'trial' in t.name]; print('ended')"
    over = "grid(lr=[0.1, 0.2], batch=[4, 3])"
    text = PROGRAM.format(trial="endless", over=over, workers=2, together=("lr",), after=after)
    done = subprocess.run([sys.executable, "-c", text, str(tmp_path)], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\nended\n", done.stderr
    assert not (tmp_path / "journal.jsonl").read_bytes()


def test_experiments_in_the_callers_threads_stop_at_their_next_step_too(tmp_path: Path) -> None:
    program = """
import sys, trials
from concurrent.futures import ThreadPoolExecutor
from functrain.search import grid, grid_search
with ThreadPoolExecutor(2) as pool:
    try:
        grid_search(trials.endless, grid(lr=[0.1, 0.2], batch=[4, 3]), executor=pool, directory=sys.argv[1], together=("lr",))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(pool.submit(int, "3").result(timeout=60))
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n3\nended\n", done.stderr


def test_killed_at_any_trial_and_called_again_it_ends_the_same(tmp_path: Path) -> None:
    over = "grid(x=range(6))"
    text = PROGRAM.format(trial="kept", over=over, workers=1, together=(), after="")
    whole = grid_search(trials.kept, grid(x=range(6)), directory=tmp_path / "whole")
    deadly = "import os, signal, trials\nkept = trials.kept\n" + (
        "def once(config):\n    if config['x'] == int(os.environ['AT']): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return kept(config)\ntrials.kept = once\n"
    )
    for at in (1, 4):
        command = [sys.executable, "-c", deadly + text, str(tmp_path / "broken")]
        done = subprocess.run(command, cwd=HERE, env={**os.environ, "AT": str(at)}, capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGKILL
    again = grid_search(trials.kept, grid(x=range(6)), directory=tmp_path / "broken")
    assert [trial._replace(seconds=0) for trial in again.trials] == [trial._replace(seconds=0) for trial in whole.trials]
    assert torch.equal(again.state["w"], whole.state["w"])
