"""Threads that decode chunks, for as long as their source is open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from functrain.data.interrupts import held_signals

# What is to be done, with its arguments; None where a thread is to end.
_Tasks = SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None]


class _Crew:
    """The threads of one process. They wait at a queue in C: an executor of the standard library has locks in Python,
    which a Ctrl-C in `submit` left held (seen)."""

    def __init__(self, threads: int) -> None:
        self._tasks: _Tasks = SimpleQueue()
        self._threads = [
            threading.Thread(target=_serve, args=(self._tasks,), name=f"functrain-decode-{number}", daemon=False)
            for number in range(threads)
        ]

    def start(self) -> None:
        # A Ctrl-C in `Thread.start` leaves too few threads, or one that waits for ever for a lock that start has left held.
        with held_signals():
            for thread in self._threads:
                thread.start()

    def put(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._tasks.put((work, arguments))

    def stop(self) -> None:
        """Drop what has not begun, and have the threads end."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)

    def join(self) -> None:
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()


def _serve(tasks: _Tasks) -> None:
    while True:
        try:
            task = tasks.get(timeout=0.2)
        except Empty:
            # A program that ends with an open source must not wait for threads that nobody will wake.
            if not threading.main_thread().is_alive():
                return
            continue
        if task is None:
            return
        work, arguments = task
        # Whoever asked for it finds the error where the chunk is missing.
        with suppress(Exception):
            work(*arguments)
        # Not kept alive by a thread that waits for the next.
        del task, work, arguments


class Pool:
    """`threads` threads, started when the first work comes; with one thread there are none, and the caller works."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._crews: dict[int, _Crew] = {}
        self._closed = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> bool:
        """Have `work` done by the next thread that is free; False where there is none, and the caller has to."""
        if self.threads < 2 or self._closed:
            return False
        # Threads do not cross a fork: each process starts its own.
        pid = os.getpid()
        crew = self._crews.get(pid)
        if crew is None:
            mine = _Crew(self.threads)
            crew = self._crews.setdefault(pid, mine)
            if crew is mine:
                try:
                    crew.start()
                except RuntimeError:
                    # The interpreter ends, or the system has no threads left: the caller works.
                    return False
                except BaseException:
                    # Interrupted: not all were started, or none.
                    self._crews.pop(pid, None)
                    crew.stop()
                    raise
        crew.put(work, arguments)
        return True

    def all(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do all of these, here and by threads that are free; the first error is raised when all have ended."""
        if self.threads < 2 or len(jobs) == 1:
            for job in jobs:
                job()
            return
        remaining, errors = iter(jobs), list[BaseException]()
        # In C: a Ctrl-C left the lock of a semaphore of the standard library held (seen).
        ended = SimpleQueue[None]()

        def work() -> None:
            for job in remaining:
                try:
                    job()
                except BaseException as error:
                    errors.append(error)
                finally:
                    ended.put(None)

        for _ in range(min(self.threads, len(jobs)) - 1):
            if not self.submit(work):
                break
        work()
        for _ in jobs:
            ended.get()
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Have the threads end, without waiting: for a source that is forgotten, at a moment that is not its own.

        A collection may come while the lock of h5py is held, which a thread may wait for.
        """
        self._closed = True
        crew = self._crews.get(os.getpid())
        if crew is not None:
            crew.stop()

    def close(self) -> None:
        """End the threads after the work that they are at; what has not begun is dropped."""
        self.stop()
        crew = self._crews.pop(os.getpid(), None)
        if crew is not None:
            crew.join()
