"""Ctrl-C in the middle of reading, and forks: what is read afterwards is right, nothing hangs, nothing is lost."""

import gc
import itertools
import os
import signal
import sys
import threading
import weakref

import h5py
import numpy as np
import pytest

from functrain.core.errors import DataError
from functrain.data.budget import Budget
from functrain.data.h5.cache import Cache
from functrain.data.h5.pool import Pool
from functrain.data.h5.source import hdf5

ROWS = 400


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("interrupted") / "a.h5"
    data = np.arange(ROWS * 64).reshape(ROWS, 64)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=data, chunks=(7, 64), compression="gzip")
        file.create_dataset("pieces", data=data, chunks=(7, 20), compression="gzip", shuffle=True)
    return str(path)


@pytest.fixture
def interrupts():
    """A function that has SIGINT come after so many seconds."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(
        signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT)
    )
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former[1])
    signal.signal(signal.SIGINT, former[0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", [20_000, 2**20])
def test_reading_goes_on_after_an_interrupt(path, interrupts, threads, memory, monkeypatch):
    # Python drops an interrupt that meets a finaliser, and tells this hook: pytest's would keep the source alive.
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    budget = Budget(memory)
    draw = np.random.default_rng(0)
    with hdf5(path, threads=threads, memory=budget) as source:
        caught = 0
        for _ in range(150):
            try:
                for attempt in itertools.count():
                    if attempt % 1000 == 0:
                        interrupts(draw.uniform(1e-5, 2e-3))
                    rows = draw.integers(0, ROWS, 40)
                    source.announce(rows[::-1], 0)
                    source.take(rows, 0)
                    source.take(np.arange(rows[0] // 2, rows[0] // 2 + 30), 0)
            except KeyboardInterrupt:
                caught += 1
            interrupts(0)
            rows = draw.integers(0, ROWS, 30)
            taken = source.take(rows, 0)
            assert np.array_equal(taken["x"][:, 0], rows * 64)
            assert np.array_equal(taken["pieces"][:, 63], rows * 64 + 63)
        assert caught == 150
    del source
    gc.collect()
    assert budget.used == 0


@pytest.mark.parametrize("stored", [{}, {"chunks": (7, 64), "compression": "gzip"}])
def test_reads_of_neighbours_and_of_whole_maps_go_on_after_an_interrupt(tmp_path, interrupts, monkeypatch, stored):
    """Several chunks at once are decoded by all threads; a map is charged to the budget, and gives way to another."""
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    data = np.arange(ROWS * 64).reshape(ROWS, 64)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in "xy":
            file.create_dataset(name, data=data, **stored)
    # Room for one of the two maps, with what lies around it.
    budget, draw = Budget(data.nbytes + 2**15), np.random.default_rng(0)
    sources = [hdf5(tmp_path / "a.h5", name, threads=2, memory=budget) for name in "xy"]

    def read_on():
        for attempt in itertools.count():
            if attempt % 1000 == 0:
                interrupts(draw.uniform(1e-5, 1e-3))
            source, start = sources[attempt % 2], int(draw.integers(0, ROWS - 200))
            source.take(np.arange(start, start + 200), 0)
            source.take(np.array([start + 5, start]), 0)

    for _ in range(200):
        with pytest.raises(KeyboardInterrupt):
            read_on()
        interrupts(0)
    for source in sources:
        assert np.array_equal(source.take(np.array([3, 1]), 0)[:, 0], [3 * 64, 64])
        source.close()
    sources.clear()
    del source
    gc.collect()
    assert budget.used == 0


def test_what_failed_is_let_go_of_at_once():
    """Not in a collection of garbage some time later, in whose finalisers a Ctrl-C would be dropped."""

    def load(number, out):
        raise DataError("damaged")

    budget = Budget(2**20)
    cache = Cache(4, 4096, budget, Pool(1), load)
    gc.disable()
    try:
        with cache.holding([1, 2]) as (memory, held):
            assert held == [None, None]
        memory = weakref.ref(memory)
        del cache
        assert memory() is None
    finally:
        gc.enable()
    assert budget.used == 0


def test_a_place_that_is_being_written_to_is_not_given_away():
    """A thread decodes a chunk, a reader that waits for it is interrupted: another chunk must not be put there."""
    begun, go = threading.Event(), threading.Event()

    def load(number, out):
        if number == 0 and threading.current_thread() is not threading.main_thread():
            out[:] = 0
            begun.set()
            go.wait(30)
        out[:] = number + 1

    pool = Pool(2)
    cache = Cache(2, 4096, Budget(8192), pool, load)
    cache.announce([0])
    assert begun.wait(30)

    def interrupted(number, frame):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupted)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt), cache.holding([0], spent=True):
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    with cache.holding([1, 2]) as (memory, held):
        go.set()
        pool.close()
        assert [int(memory[place].min()) for place in held] == [2, 3]
        assert [int(memory[place].max()) for place in held] == [2, 3]


def test_a_forked_process_counts_what_it_holds_itself(path):
    budget = Budget(2**20)
    first, second = hdf5(path, "x", threads=2, memory=budget), hdf5(path, "pieces", memory=budget)
    first.take(np.arange(0, ROWS, 3), 0)
    held = budget.used
    child = os.fork()
    if not child:
        right = budget.used == 0 and int(second.take(np.array([5, 3]), 0)[1, 0]) == 3 * 64
        right = right and 0 < budget.used <= 2 * held
        first.close()
        second.close()
        del first, second
        gc.collect()
        os._exit(0 if right and budget.used == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert budget.used == held
    first.close()
    second.close()


def test_a_file_that_was_replaced_is_not_read_by_a_forked_process(path, tmp_path):
    mine, other = tmp_path / "a.h5", tmp_path / "b.h5"
    for name, value in ((mine, 1), (other, 2)):
        with h5py.File(name, "w") as file:
            file.create_dataset("x", data=np.full(9, value), chunks=(4,), scaleoffset=0)
    with hdf5(mine, "x") as source:
        assert int(source(3)) == 1
        os.replace(other, mine)
        child = os.fork()
        if not child:
            try:
                source(8)
            except DataError as error:
                os._exit(0 if "was replaced" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_a_source_that_is_forgotten_in_the_middle_of_h5py_hangs_nobody(path):
    with hdf5(path, "x", threads=2) as source:
        source.take(np.arange(ROWS)[::5], 0)
    forgotten = [hdf5(path, "pieces", threads=2)]
    forgotten[0].announce(np.arange(ROWS), 0)
    forgotten.append(forgotten)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("functrain-decode")]
    assert workers
    with h5py._objects.phil:
        del forgotten
        gc.collect()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
