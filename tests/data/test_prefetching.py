"""Prefetching when things go wrong: leaving early, errors, interrupts, forks, programs that just end."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from functrain.core.errors import ArgumentError
from functrain.core.explain import explain
from functrain.data import Source, arrays, prefetch

TEN = arrays(torch.arange(10))


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Gated(Source):
    """Loads only what the test has let through; tells when a load has begun."""

    length = 10

    def __init__(self):
        self.begun, self.let = threading.Semaphore(0), threading.Semaphore(0)

    def get(self, i, epoch):
        self.begun.release()
        assert self.let.acquire(timeout=30)
        return torch.tensor(i)


def test_leaving_while_a_load_is_under_way_waits_for_it():
    source = Gated()
    with prefetch(source, 2) as batches:
        stream = iter(batches)
        assert source.begun.acquire(timeout=30)
        threading.Timer(0.05, source.let.release).start()
    with pytest.raises(ArgumentError, match="has ended"):
        next(stream)
    assert not source.begun.acquire(blocking=False)


def test_leaving_by_an_exception_ends_the_thread_and_lets_it_through():
    with pytest.raises(KeyError, match="mine"), prefetch(TEN, 2) as batches:  # noqa: PT012
        for _ in batches:
            raise KeyError("mine")


def test_every_error_surfaces_even_those_that_are_no_exceptions():
    for kind in (SystemExit, KeyboardInterrupt, MemoryError, GeneratorExit):

        def fail(n, kind=kind):
            raise kind("from the source")

        with prefetch(TEN.map(fail), 3) as batches:
            stream = iter(batches)
            with pytest.raises(kind, match="from the source"):
                next(stream)
            assert list(stream) == []


def test_a_source_that_raises_stopiteration_does_not_end_the_epoch_in_silence():
    def fail(n):
        raise StopIteration

    with prefetch(TEN.map(fail), 3) as batches, pytest.raises(RuntimeError, match="StopIteration"):
        list(batches)


def test_an_error_shows_where_in_the_source_it_was_raised():
    def culprit(n):
        raise ValueError("here")

    with prefetch(TEN.map(culprit)) as batches, pytest.raises(ValueError, match="here") as caught:
        list(batches)
    assert "culprit" in [entry.name for entry in caught.traceback]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: prefetch(TEN, 0), "depth must be an int of at least 1"),
        (lambda: prefetch(TEN, 1.5), "depth must be an int"),
        (lambda: prefetch(3), "takes a source or an iterable, got int"),
        (lambda: iter(prefetch(TEN)), "with prefetch"),
        (lambda: prefetch(TEN).between(0, 3), "with prefetch"),
    ],
)
def test_wrong_use_is_named(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        wrong()


def test_wrong_use_inside_is_named():
    with prefetch([1, 2]) as items, pytest.raises(ArgumentError, match="needs a source"):
        items.between(0, 2)
    with prefetch(TEN) as batches:
        for start, stop in ((-1, 3), (3, 2)):
            with pytest.raises(ArgumentError, match="0 ≤ start ≤ stop"):
                batches.between(start, stop)
        with pytest.raises(ArgumentError, match="in use already"):
            batches.__enter__()
        assert list(batches.between(3, 3)) == []


def test_one_stream_at_a_time():
    with prefetch(TEN, 2) as batches:
        first = iter(batches)
        next(first)
        assert [int(n) for n in batches.between(8, 12)] == [8, 9, 0, 1]
        with pytest.raises(ArgumentError, match="another stream"):
            next(first)
        assert [int(n) for n in batches] == list(range(10))


def test_an_iterator_goes_on_where_it_was_left():
    with prefetch(iter(range(10)), 4) as items:
        for item in items:
            if item == 3:
                break
        assert list(items) == [4, 5, 6, 7, 8, 9]
        assert list(items) == []
    with prefetch([1, 2, 3], 4) as items:
        assert [list(items), list(items)] == [[1, 2, 3]] * 2


def test_endless_streams_and_endless_sources():
    with prefetch(TEN, 4) as batches:
        stream = batches.between(5)
        assert [int(next(stream)) for _ in range(12)] == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
    with prefetch(TEN.repeat(), 4) as batches:
        assert batches.length is None
        stream = iter(batches)
        assert [int(next(stream)) for _ in range(12)] == [*range(10), 0, 1]


def test_one_prefetch_inside_another():
    with prefetch(TEN.batch(3), 2) as inner, prefetch(inner, 2) as outer:
        assert torch.cat(list(outer)).tolist() == list(range(10))
    with prefetch(TEN.repeat(), 2) as inner, prefetch(inner, 2) as outer:
        assert int(next(iter(outer))) == 0


def test_elements_handed_out_are_not_kept():
    class Element:
        pass

    made = []

    def elements():
        while True:
            element = Element()
            made.append(weakref.ref(element))
            yield element

    depth = 3
    with prefetch(elements(), depth) as stream:
        for _, element in zip(range(50), stream):
            del element
            # One load may be on its way from hand to hand.
            assert sum(ref() is not None for ref in made) <= depth + 2


def test_a_stream_that_is_forgotten_ends_its_thread():
    batches = prefetch(TEN.repeat(), 2).__enter__()
    next(iter(batches))
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "functrain-prefetch"]
    del batches
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_an_interrupt_while_waiting_loses_nothing_in_silence():
    source = Gated()
    main = threading.main_thread().ident

    def interrupt():
        while sys._current_frames()[main].f_code.co_name != "__next__":
            pass
        signal.pthread_kill(main, signal.SIGINT)
        for _ in range(100):
            source.let.release()

    with prefetch(source, 2) as batches:
        stream = batches.between(0)
        thread = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            thread.start()
            next(stream)
        # Interrupted before it waited, it goes on with the first; interrupted later, it says so.
        try:
            assert int(next(stream)) == 0
        except ArgumentError as error:
            assert "interrupted" in str(error)  # noqa: PT017
        thread.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork_the_child_is_told_instead_of_waiting_for_ever():
    with prefetch(TEN.repeat(), 2) as batches:
        stream = iter(batches)
        next(stream)
        pid = os.fork()
        if pid == 0:
            try:
                next(stream)
            except ArgumentError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


ENDS = """
import torch
from functrain.data import arrays, prefetch
batches = prefetch(arrays(torch.arange(10)).repeat(), 2).__enter__()
stream = iter(batches)
next(stream)
{last}
"""


@pytest.mark.parametrize(("last", "code"), [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_a_program_that_ends_without_leaving_the_block_ends(last, code):
    ended = subprocess.run([sys.executable, "-c", ENDS.format(last=last)], timeout=60, capture_output=True, check=False)
    assert ended.returncode == code


def test_a_cheap_element_costs_microseconds():
    class Cheap(Source):
        length, element = 5000, torch.zeros(1)

        def get(self, i, epoch):
            return self.element

    costs = []
    for _ in range(5):
        start = time.perf_counter()
        with prefetch(Cheap(), 4) as batches:
            for _ in batches:
                pass
        costs.append((time.perf_counter() - start) / 5000)
    # 2 to 13 µs in nearly all runs, 32 in the worst: the bound is wide, for machines that are busy.
    assert min(costs) < 100e-6


def test_explain_names_depth_and_source():
    text = str(explain(prefetch(TEN.batch(3), 4)))
    assert "depth: 4" in text
    assert "4 of 3" in text
    assert "of: list" in str(explain(prefetch([1])))
    assert prefetch(TEN).length == 10
    assert prefetch([1]).length is None


def take_all(stream, taken, ended):
    try:
        for element in stream:
            taken.append(int(element))
        ended.append("end")
    except Exception as error:
        ended.append(f"{type(error).__name__}: {error}")


def consumers(stream, count):
    taken, ended = [], []
    threads = [threading.Thread(target=take_all, args=(stream, taken, ended), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, taken, ended


def joined(threads):
    for thread in threads:
        thread.join(timeout=30)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("depth", [1, 3])
def test_threads_that_share_a_stream_all_come_to_its_end(depth):
    hundred = arrays(torch.arange(100))
    for _ in range(20):
        with prefetch(hundred, depth) as batches:
            threads, taken, ended = consumers(iter(batches), 4)
            assert joined(threads)
        assert sorted(taken) == list(range(100))
        assert ended == ["end"] * 4


def test_an_error_goes_to_one_of_the_threads_and_ends_the_others():
    def fail(n):
        if n == 6:
            raise KeyError("six")
        return n

    with prefetch(TEN.map(fail), 2) as batches:
        threads, taken, ended = consumers(iter(batches), 3)
        assert joined(threads)
    assert sorted(taken) == list(range(6))
    assert sorted(ended) == ["KeyError: 'six'", "end", "end"]


def test_closing_frees_every_thread_that_waits():
    source = Gated()
    with prefetch(source, 2) as batches:
        threads, taken, ended = consumers(iter(batches), 3)
        source.let.release()
        # Element 0 is loaded; the load of element 1 is under way.
        for _ in range(2):
            assert source.begun.acquire(timeout=30)
        closing = threading.Thread(target=batches.close, daemon=True)
        closing.start()
        assert batches._stream._closed.wait(timeout=30)
        source.let.release(2)
        assert joined([closing, *threads])
    assert len(taken) < 10
    assert len(ended) == 3
    assert all("`with` block of this prefetch has ended" in reason for reason in ended)


@pytest.mark.parametrize("start", [0, 3])
def test_positions_of_an_empty_source_are_an_error_and_its_epoch_is_empty(start):
    empty = arrays(torch.arange(3)).shard(5, 9)
    with prefetch(empty, 2) as batches:
        assert list(batches) == []
        assert list(batches.between(start, start)) == []
        for stop in (None, start + 2):
            with pytest.raises(ArgumentError, match="without elements cannot be repeated"):
                batches.between(start, stop)
