"""Threads that decode chunks, for as long as their source is open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Pool:
    """`threads` threads, started when the first work comes; with one thread there are none, and the caller works."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executors: dict[int, ThreadPoolExecutor] = {}
        self._closed = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> bool:
        """Have `work` done by the next thread that is free; False where there is none, and the caller has to."""
        if self.threads < 2 or self._closed:
            return False
        # Threads do not cross a fork: each process starts its own.
        pid = os.getpid()
        executor = self._executors.get(pid)
        if executor is None:
            mine = ThreadPoolExecutor(self.threads, "functrain-decode")
            executor = self._executors.setdefault(pid, mine)
        try:
            executor.submit(work, *arguments)
        except RuntimeError:
            # Closed in between, or the interpreter ends.
            return False
        return True

    def all(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do all of these, here and by threads that are free; the first error is raised when all have ended."""
        if self.threads < 2 or len(jobs) == 1:
            for job in jobs:
                job()
            return
        remaining, errors = iter(jobs), list[BaseException]()
        ended = threading.Semaphore(0)

        def work() -> None:
            for job in remaining:
                try:
                    job()
                except BaseException as error:
                    errors.append(error)
                finally:
                    ended.release()

        for _ in range(min(self.threads, len(jobs)) - 1):
            if not self.submit(work):
                break
        work()
        for _ in jobs:
            ended.acquire()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads after the work that they are at; what has not begun is dropped."""
        self._closed = True
        executor = self._executors.pop(os.getpid(), None)
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)
