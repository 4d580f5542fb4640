"""Elements on their way from the threads that load them to whoever takes them, in order."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.interrupts import held_signals
from functrain.data.turns import Turns
from functrain.data.waits import Clock, Stats

Load = Callable[[int, Clock], Any]


class Parcel(NamedTuple):
    """An element that has to be opened by whoever takes it."""

    element: Tree
    size: int
    event: Any


class Stream(Iterator[Tree]):
    """The elements that `load(0)`, `load(1)` … give, until it raises `StopIteration`; `workers` threads call it.

    `turns` say which load may begin, `ready` holds what was loaded. Both are C queues, whose waiting side sleeps on
    a lock. What a cheap element costs is its share of two switches between threads for every `depth` elements. At depth 4
    that was 3.4 µs pinned to one core; free on two shared cores 2 to 4 µs in most runs, 12 in some, and up to 32 in single
    ones.

    - `unpack`: what is done, where it is taken, with a `Parcel` that `load` gave.
    - `settle`: called once all loading has ended, to let go of what was loaded and not taken.
    """

    def __init__(
        self,
        load: Load,
        turns: Turns,
        workers: int,
        unpack: Callable[[Parcel], Tree] | None = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._turns, self._free = turns, turns.free
        self._unpack, self._settle = unpack, settle or _nothing
        self._over: str | None = None
        self._done = False
        self._items, self._waited = 0, 0.0
        self._pid = os.getpid()
        # Before any thread begins: whatever interrupts this, they end.
        weakref.finalize(self, turns.stop).atexit = False
        self._clocks = [Clock() for _ in range(workers)]
        order = _Order(self._ready, workers) if workers > 1 else None
        self._threads = [
            threading.Thread(
                target=_produce, args=(load, turns, self._ready, order, clock), name="functrain-prefetch", daemon=False
            )
            for clock in self._clocks
        ]
        try:
            # A Ctrl-C in `Thread.start` leaves a thread that waits for ever.
            with held_signals():
                for thread in self._threads:
                    thread.start()
        except BaseException:
            turns.stop()
            for thread in self._threads:
                if thread.is_alive():
                    thread.join()
            raise

    @property
    def alive(self) -> bool:
        """Whether elements may be taken from it."""
        return self._over is None

    def __next__(self) -> Tree:
        if self._done:
            raise StopIteration
        if self._over is not None:
            raise ArgumentError(self._over)
        if os.getpid() != self._pid:
            raise ArgumentError("this prefetch belongs to the process that opened it: open one after the fork")
        try:
            if self._ready.empty():
                since = perf_counter()
                item = self._ready.get()
                waited = perf_counter() - since
                self._waited += waited
            else:
                item = self._ready.get()
            if item.__class__ is Parcel and self._unpack is not None:
                item = self._unpack(item)
            self._free.put(True)
        except BaseException:
            # Interrupted (Ctrl-C): whether an element was taken cannot be known, so the stream does not go on.
            self.close("this stream was interrupted: open another, from the position that was reached")
            raise
        if item.__class__ is _End:
            return self._finish(item)
        if self._over is not None:
            # Closed meanwhile: those before it may have been dropped.
            raise ArgumentError(self._over)
        self._items += 1
        return item

    def _finish(self, end: _End) -> Any:
        # Other threads may be waiting for an element too: each finds an end, and puts one back for the next.
        self._done = self._done or end.whole or end.error is not None
        self._ready.put(_End(end.whole))
        self._turns.stop()
        self._join()
        self._settle()
        if end.error is not None:
            raise end.error
        if not self._done:
            raise ArgumentError(self._over or "this stream was cut short: the main thread has ended")
        raise StopIteration

    def close(self, reason: str = "this stream was closed: open another") -> None:
        """End the threads and drop what was loaded; taking, or waiting to take, is an error from now on."""
        if self._over is None:
            self._over = reason
        self._turns.stop()
        if os.getpid() != self._pid:
            self._ready = SimpleQueue()
            return
        try:
            self._join()
        except KeyboardInterrupt:
            # The threads still end with the loads under way; a second interrupt leaves them to do so alone.
            self._join()
            raise
        finally:
            # Emptied, and not replaced: other threads may be waiting at it.
            with suppress(Empty):
                while True:
                    self._ready.get_nowait()
            self._ready.put(_End(False))
            self._settle()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def stats(self) -> Stats:
        """What was done so far, and who waited."""
        spent = [clock.spent() for clock in self._clocks]
        size = sum(clock.bytes for clock in self._clocks) if self._unpack is not None else None
        idle, loading = (sum(seconds) for seconds in zip(*spent))
        return Stats(self._items, self._waited, idle, loading, size, len(self._clocks))


def _nothing() -> None:
    pass


class _End:
    """The last thing in a stream: `whole` if all elements came before it, else with the error that cut it short, if any."""

    def __init__(self, whole: bool, error: BaseException | None = None) -> None:
        self.whole, self.error = whole, error


class _Order:
    """What several loaders give, in the order of their numbers, up to the first end."""

    def __init__(self, ready: SimpleQueue[Any], loaders: int) -> None:
        self._ready, self._loaders = ready, loaders
        self._lock = threading.Lock()
        self._early: dict[int, Any] = {}
        self._due, self._over = 0, False

    def put(self, number: int, item: Any) -> None:
        with self._lock:
            self._early[number] = item
            while not self._over and self._due in self._early:
                due = self._early.pop(self._due)
                self._due += 1
                self._over = due.__class__ is _End
                self._ready.put(due)
            if self._over:
                self._early.clear()

    def leave(self, number: int | None, last: _End) -> None:
        """A loader ends: at a number of its own, or because it was told to. With the last one the stream ends."""
        if number is not None:
            self.put(number, last)
        with self._lock:
            self._loaders -= 1
            if not self._loaders and not self._over:
                self._ready.put(last)


def _produce(load: Load, turns: Turns, ready: SimpleQueue[Any], order: _Order | None, clock: Clock) -> None:
    # Holds no reference to the stream, so that a stream that is forgotten can be let go of.
    clock.begin()
    number, end = None, _End(False)
    try:
        while (number := turns.next(clock)) is not None:
            if order is None:
                ready.put(load(number, clock))
            else:
                order.put(number, load(number, clock))
    except StopIteration:
        end = _End(True)
    except BaseException as problem:
        end = _End(False, problem)
    finally:
        turns.stop()
        clock.end()
        if order is None:
            ready.put(end)
        else:
            order.leave(number, end)


__all__ = ["Load", "Parcel", "Stream"]
