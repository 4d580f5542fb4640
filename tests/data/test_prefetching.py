"""Prefetching when things go wrong: leaving early, errors, interrupts, forks, programs that just end."""

import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError
from functrain.core.explain import explain
from functrain.data import Source, arrays, prefetch, source

TEN = arrays(torch.arange(10))
WORKERS = pytest.mark.parametrize("workers", [1, 2, 4])


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


@pytest.mark.parametrize("workers", [1, 2])
def test_leaving_while_loads_are_under_way_waits_for_them(workers):
    source = Gated()
    with prefetch(source, 2, workers=workers) as batches:
        stream = iter(batches)
        for _ in range(workers):
            assert source.begun.acquire(timeout=30)
        threading.Timer(0.05, source.let.release, (workers,)).start()
    with pytest.raises(ArgumentError, match="has ended"):
        next(stream)
    assert not source.begun.acquire(blocking=False)


def test_leaving_by_an_exception_ends_the_thread_and_lets_it_through():
    with pytest.raises(KeyError, match="mine"), prefetch(TEN, 2) as batches:  # noqa: PT012
        for _ in batches:
            raise KeyError("mine")


@WORKERS
def test_every_error_surfaces_even_those_that_are_no_exceptions(workers):
    for kind in (SystemExit, KeyboardInterrupt, MemoryError, GeneratorExit):

        def fail(n, kind=kind):
            raise kind("from the source")

        with prefetch(TEN.map(fail), 4, workers=workers) as batches:
            stream = iter(batches)
            with pytest.raises(kind, match="from the source"):
                next(stream)
            assert list(stream) == []


@WORKERS
def test_a_source_that_raises_stopiteration_does_not_end_the_epoch_in_silence(workers):
    def fail(n):
        raise StopIteration

    with prefetch(TEN.map(fail), 4, workers=workers) as batches, pytest.raises(RuntimeError, match="StopIteration"):
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
        (lambda: prefetch(TEN, 0), "depth must be at least 1"),
        (lambda: prefetch(TEN, 1.5), "depth must be an int"),
        (lambda: prefetch(TEN, True), "depth must be an int"),
        (lambda: prefetch(TEN, workers=0), "workers must be at least 1"),
        (lambda: prefetch(TEN, workers=2.0), "workers must be an int"),
        (lambda: prefetch(TEN, 2, workers=3), "at most depth=2 elements are loaded at a time, so by as many workers: got 3"),
        (lambda: prefetch([1, 2], workers=2), "one after the other, workers=1"),
        (lambda: prefetch(source(lambda: iter([1, 2])).batch(2), workers=2), "one after the other, workers=1"),
        (lambda: prefetch(TEN, memory=0), "memory takes a number of bytes above 0"),
        (lambda: prefetch(TEN, memory="much"), "memory takes a number of bytes"),
        (lambda: prefetch(TEN, device=True), "device takes a torch.device"),
        (lambda: prefetch(TEN, device="abacus"), "device='abacus' cannot be used here"),
        (lambda: prefetch(TEN, device="cuda:99"), "device='cuda:99' cannot be used here"),
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


@WORKERS
@pytest.mark.parametrize("memory", [None, 16])
def test_a_stream_that_is_forgotten_ends_its_threads(workers, memory):
    batches = prefetch(TEN.repeat(), 4, workers=workers, memory=memory).__enter__()
    next(iter(batches))
    threads = [thread for thread in threading.enumerate() if thread.name == "functrain-prefetch"]
    assert len(threads) == workers
    del batches
    gc.collect()
    assert joined(threads)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory": 100}], ids=str)
def test_an_interrupt_while_waiting_loses_nothing_in_silence(options):
    source = Gated()
    main = threading.main_thread().ident

    def interrupt():
        while sys._current_frames()[main].f_code.co_name != "__next__":
            pass
        signal.pthread_kill(main, signal.SIGINT)
        for _ in range(100):
            source.let.release()

    with prefetch(source, 2, **options) as batches:
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
@pytest.mark.parametrize("options", [{}, {"workers": 2, "memory": 100, "device": "cpu"}], ids=str)
def test_after_a_fork_the_child_is_told_instead_of_waiting_for_ever(options):
    with prefetch(TEN.repeat(), 2, **options) as batches:
        stream = iter(batches)
        next(stream)
        pid = os.fork()
        if pid == 0:
            try:
                next(stream)
            except ArgumentError:
                batches.close()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


ENDS = """
import torch
from functrain.data import arrays, prefetch
batches = prefetch(arrays(torch.arange(10)).repeat(), 2{options}).__enter__()
stream = iter(batches)
next(stream)
{last}
"""


@pytest.mark.parametrize(
    ("last", "code", "options"),
    [("", 0, ""), ("raise SystemExit(3)", 3, ", workers=2"), ("1 / 0", 1, ", workers=2, memory=16")],
)
def test_a_program_that_ends_without_leaving_the_block_ends(last, code, options):
    program = ENDS.format(last=last, options=options)
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, check=False)
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


def test_explain_names_depth_source_and_options():
    text = str(explain(prefetch(TEN.batch(3), 4)))
    assert "depth: 4" in text
    assert "4 of 3" in text
    assert "workers: 1 thread" in text
    assert "memory:" not in text
    with prefetch(TEN, 4, workers=2, memory="2 KiB", device="cpu") as batches:
        list(batches)
        text = str(explain(batches))
    for line in ("workers: 2 threads", "memory: loaded and not yet taken: at most 2.0 KiB", "device: cpu", "so far: 10 items"):
        assert line in text
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


@pytest.mark.parametrize(("depth", "options"), [(1, {}), (3, {}), (3, {"workers": 3}), (3, {"workers": 2, "memory": 16})])
def test_threads_that_share_a_stream_all_come_to_its_end(depth, options):
    hundred = arrays(torch.arange(100))
    for _ in range(20):
        with prefetch(hundred, depth, **options) as batches:
            threads, taken, ended = consumers(iter(batches), 4)
            assert joined(threads)
        assert sorted(taken) == list(range(100))
        assert ended == ["end"] * 4


@WORKERS
def test_an_error_goes_to_one_of_the_threads_and_ends_the_others(workers):
    def fail(n):
        if n == 6:
            raise KeyError("six")
        return n

    with prefetch(TEN.map(fail), 4, workers=workers) as batches:
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
        while batches._stream.alive:
            assert closing.is_alive()
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


# --- several workers ----------------------------------------------------------------------------------------------------


class Held(Source):
    """Positions whose loads wait until the test lets each one go."""

    length = 6

    def __init__(self):
        self.let = [threading.Event() for _ in range(self.length)]
        self.begun = [threading.Event() for _ in range(self.length)]

    def get(self, i, epoch):
        self.begun[i].set()
        assert self.let[i].wait(30)
        if i == 3:
            raise KeyError("three")
        return torch.tensor(i)


def test_loads_that_end_out_of_order_are_given_in_order_and_their_errors_too():
    source = Held()
    with prefetch(source, 4, workers=4) as batches:
        stream = iter(batches)
        for i in (3, 2, 1, 0):
            assert source.begun[i].wait(30)
            source.let[i].set()
        assert [int(next(stream)) for _ in range(3)] == [0, 1, 2]
        # Those that follow may be under way by now: the error waits for them.
        for event in source.let:
            event.set()
        with pytest.raises(KeyError, match="three"):
            next(stream)
        assert list(stream) == []


# --- announcing ---------------------------------------------------------------------------------------------------------


class Announced(Source):
    """Notes what it was told of, and what it was asked for."""

    length = 7

    def __init__(self):
        self.notes, self.lock = [], threading.Lock()

    def announce(self, indices, epoch):
        assert indices.dtype == np.int64
        with self.lock:
            self.notes += [("told", i, epoch) for i in indices.tolist()]

    def get(self, i, epoch):
        with self.lock:
            self.notes.append(("asked", i, epoch))
        return torch.tensor(i)


@pytest.mark.parametrize(("workers", "memory"), [(1, None), (3, None), (1, 100), (3, 100)])
def test_elements_are_announced_once_before_they_are_loaded_and_as_far_ahead_as_they_may_be(workers, memory):
    source = Announced()
    with prefetch(source.shuffle(0), 4, workers=workers, memory=memory) as batches:
        order = [int(n) for n in batches.between(5, 16)]
    expected = [source.shuffle(0).indices(np.array([p % 7]), p // 7)[0] for p in range(5, 16)]
    assert order == expected
    places = [(int(n), p // 7) for n, p in zip(expected, range(5, 16))]
    assert [note[1:] for note in source.notes if note[0] == "told"] == places
    asked = 0
    for n, (kind, *place) in enumerate(source.notes):
        if kind == "asked":
            asked += 1
            assert ("told", *place) in source.notes[:n]
        else:
            # `depth` elements are outstanding at most: so many are told of and not yet loaded.
            assert places.index(tuple(place)) - asked < 4 + workers
    assert asked == 11


def test_what_nobody_heeds_is_not_announced(monkeypatch):
    assert Announced().shuffle(0).batch(2).zip(TEN.split(0.4)[0]).repeat().heeding
    assert not TEN.shuffle(0).batch(2).repeat().heeding
    monkeypatch.setattr(type(TEN), "announce", lambda *arguments: pytest.fail("announced"), raising=False)
    monkeypatch.setattr(Source, "heeding", False)
    with prefetch(TEN.shuffle(0), 4) as batches:
        assert len(list(batches)) == 10


def test_an_announcement_that_fails_is_an_error_of_the_stream():
    class Broken(Announced):
        def announce(self, indices, epoch):
            if 5 in indices:
                raise OSError("no such chunk")

    with prefetch(Broken(), 2, workers=2) as batches, pytest.raises(OSError, match="no such chunk"):
        list(batches)


# --- statistics ---------------------------------------------------------------------------------------------------------


def work(seconds=0.002):
    """Work of about so many seconds, in which other threads go on."""
    data, end = bytes(1 << 16), time.perf_counter() + seconds
    while time.perf_counter() < end:
        hashlib.sha256(data).digest()


class Slow(Source):
    length = 20

    def __init__(self):
        self.seconds, self.lock = 0.0, threading.Lock()

    def get(self, i, epoch):
        begun = time.perf_counter()
        work()
        with self.lock:
            self.seconds += time.perf_counter() - begun
        return torch.zeros(25)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory": "1 MiB"}, {"workers": 2, "memory": 300}], ids=str)
def test_stats_say_that_loading_is_slow(options):
    source = Slow()
    with prefetch(source, 2, **options) as batches:
        for _ in batches:
            pass
        stats = batches.stats
    assert stats.items == 20
    assert stats.bytes == (2000 if "memory" in options else None)
    assert stats.loading >= 0.9 * source.seconds
    assert stats.waited > 0.3 * source.seconds / batches.workers
    assert stats.bottleneck == "loading"
    assert "loading is the bottleneck" in str(stats)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"workers": 2, "memory": 80}], ids=str)
def test_stats_say_that_training_is_slow(options):
    with prefetch(TEN, 2, **options) as batches:
        assert batches.stats.items == 0
        assert batches.stats.bottleneck == "neither"
        for _ in range(2):
            for _ in batches:
                work(0.004)
    # Of both streams, and after the block too.
    stats = batches.stats
    assert stats.items == 20
    assert stats.idle > 0.03 * batches.workers
    assert stats.bottleneck == "training"
    assert "loading keeps up" in str(stats)
    assert str(stats) == str(batches.stats)


def test_a_stream_opened_while_the_block_is_left_ends_too():
    def consume(stream, ended):
        try:
            for _ in stream:
                pass
        except ArgumentError:
            pass
        ended.set()

    for _ in range(60):
        ended = threading.Event()
        with prefetch(arrays(torch.arange(10**6)).batch(1), 2) as stream:
            thread = threading.Thread(target=consume, args=(stream, ended))
            thread.start()
        assert ended.wait(30)
        thread.join()
