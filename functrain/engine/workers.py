"""Worker threads for the time of one call: joined before it returns, and every thread setting put back."""

from __future__ import annotations

import contextvars
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from functrain.core.errors import ArgumentError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_workers(workers: int | None) -> int:
    """`workers`, or as many as there are processors for None; `ArgumentError` below 1."""
    if workers is None:
        return default_workers()
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ArgumentError(f"workers must be an int of at least 1, got {workers!r}")
    return workers


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Within the block, torch uses `count` threads inside an operation; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int, intra_op: int) -> Iterator[Result]:
    """`function(item)` for each item, in order, on `workers` threads with `intra_op` threads inside an operation each.

    At most `workers + 1` results are computed and not yet taken, however many items there are. Grad mode, autocast and
    context variables are the caller's. An error stops the items that have not begun and is raised in the caller, with its
    own traceback, once every thread has ended; so do they all when the iterator is closed.
    """
    grad_mode = torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()

    def work(item: Item) -> Result:
        # A new thread starts with torch's defaults: none of the caller's settings reach it by themselves.
        torch.set_num_threads(intra_op)
        with (
            torch.set_grad_enabled(grad_mode),
            torch.autocast("cpu", dtype=autocast[1], enabled=autocast[0], cache_enabled=autocast[2]),
        ):
            return function(item)

    ahead: deque[Future[Result]] = deque()
    with intra_op_threads(torch.get_num_threads()), ThreadPoolExecutor(workers, "functrain-part") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(contextvars.copy_context().run, work, item))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
