"""Kill and resume in the middle of a shuffled, mixed, prefetched, sharded epoch, with another number of ranks."""

import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import resharded
from hypothesis import given
from hypothesis import strategies as st
from laid import Laid, numbers

import functrain as ft

CHUNKED, CONTIGUOUS = 203, 161


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resharding")
    ft.h5write(path / "chunked.h5", {"id": np.arange(CHUNKED)}, chunks=4, compression="gzip")
    ft.h5write(path / "contiguous.h5", {"id": np.arange(CHUNKED, CHUNKED + CONTIGUOUS)})
    return path


def killed(folder, ranks, start, stop, kill_at):
    """What ranks, each a process, wrote down from step `start` on until all are killed: the first has just done `kill_at`."""
    command = [sys.executable, resharded.__file__, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    processes = [subprocess.Popen([*command, *map(str, (rank, ranks, start, stop))], **pipes) for rank in range(ranks)]
    try:
        for step in range(start, kill_at):
            assert [int(process.stdout.readline()) for process in processes] == [step] * ranks
            for process in processes:
                process.stdin.write(b"\n")
                process.stdin.flush()
        assert int(processes[0].stdout.readline()) == kill_at
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert {process.returncode for process in processes} == {-signal.SIGKILL}
    texts = [resharded.log(folder, rank).read_bytes() for rank in range(ranks)]
    return [dict(json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")) for text in texts]


def test_a_run_killed_within_an_epoch_goes_on_with_another_number_of_ranks(folder):
    """In the second epoch, of 23 steps: 2 ranks are killed in step 9; 3 ranks, or 1, take what is left."""
    with resharded.batches(folder) as whole:
        assert "blocks: " in str(ft.explain(whole))
        steps = len(whole)
        never_stopped = {steps + i: whole.get(i, 1)["id"].tolist() for i in range(steps)}
    assert steps == 23
    given_to = killed(folder, 2, steps, 2 * steps, steps + 9)
    # A step counts once every rank has done it: that is the position in a checkpoint. What lies behind is done again.
    position = min(max(of_rank) for of_rank in given_to) + 1
    assert position in (steps + 9, steps + 10)
    before = {step: [n for of_rank in given_to for n in of_rank[step]] for step in range(steps, position)}
    for ranks in (3, 1):
        later = [dict(resharded.given(folder, rank, ranks, position, 2 * steps)) for rank in range(ranks)]
        assert [list(of_rank) for of_rank in later] == [list(range(position, 2 * steps))] * ranks
        seen = before | {step: [n for of_rank in later for n in of_rank[step]] for step in later[0]}
        assert sorted(itertools.chain(*seen.values())) == list(range(CHUNKED + CONTIGUOUS))
        # Step by step they are the batches of a run that was never stopped.
        assert seen == never_stopped


@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    size=st.integers(4, 20),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 4)), max_size=5),
    epoch=st.integers(0, 3),
)
def test_whatever_the_numbers_of_ranks_each_sample_comes_once_an_epoch(sizes, size, cuts, epoch):
    """The same without processes: any cuts, any numbers of ranks."""
    first, second = sizes
    base = ft.mix([Laid((first, 7)).shuffle(1, within=200), numbers(second).map(lambda n: n + first).shuffle(2)], seed=3)
    if len(base) < size:
        return
    batches = base.batch(size, drop_last=len(base) % size < 4)
    position, seen = 0, []
    for where, ranks in [*sorted(cuts), (1.0, 2)]:
        stop = round(where * len(batches))
        parts = [batches.part(rank, ranks) for rank in range(ranks)]
        seen += [n for i in range(position, stop) for part in parts for n in part.get(i, epoch).tolist()]
        position = max(position, stop)
    kept = len(base) - batches.dropped
    assert len(seen) == len(set(seen)) == kept
    assert set(seen) <= set(range(first + second))
    if not batches.dropped:
        assert sorted(seen) == list(range(first + second))
