"""Gradients that run out of memory: run by test_memory.py in a process of its own, whose limit no other test is to feel.

Losses take scratch memory that they never write to, so that address space runs out and the machine's memory does not.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from instances import keyed_loss, net_batch, net_params

import functrain as ft

# Bytes of scratch memory for an example; eight examples in four parts, and room for five.
UNIT = 1 << 27
BATCH, PARTS, ROOM = net_batch(8), 4, 5


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def room_for(units: float) -> Iterator[None]:
    """Within the block, room for the scratch memory of so many examples more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + int(units * UNIT), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Together:
    """Lets the first `count` callers go on when each has what it takes, or when one of them could not get it."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)

    def __call__(self, take: Callable[[], Any]) -> Any:
        try:
            taken = take()
        except (RuntimeError, MemoryError):
            self.barrier.abort()
            raise
        with suppress(threading.BrokenBarrierError):
            self.barrier.wait()
        return taken


def hungry(workers: int = 1) -> Callable[..., Any]:
    together = Together(workers)

    def loss(params: Any, batch: Any, *, key: Any) -> Any:
        x = batch["x"]
        scratch = together(lambda: x.new_empty((len(x), UNIT // x.element_size())))
        assert scratch.shape[0] == len(x)
        return keyed_loss(params, batch, key=key)

    return ft.grad(loss)


def drawn() -> Any:
    """A batch whose parts take their scratch memory, of NumPy's, where they are drawn."""
    together = Together(PARTS)

    def draw(start: int, stop: int) -> Any:
        scratch = together(lambda: np.empty((stop - start, UNIT), np.uint8))
        assert len(scratch) == stop - start
        return ft.tree.map(lambda leaf: leaf[start:stop], BATCH)

    return ft.Deferred(len(BATCH["x"]), draw)


# What is called, with which batch, and with room for how many examples. Made anew for each run: what ran out remembers it.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], float]] = {
    "threads": (lambda: ft.parallel(hungry(4), PARTS, how="threads", workers=4, exact=True), lambda: BATCH, ROOM),
    "two threads": (lambda: ft.parallel(hungry(2), PARTS, how="threads", workers=2, exact=True), lambda: BATCH, 3),
    "drawn": (lambda: ft.parallel(ft.grad(keyed_loss), PARTS, how="threads", workers=4, exact=True), drawn, ROOM),
    "stacks": (lambda: ft.parallel(ft.grad(keyed_loss), PARTS, how="threads", workers=4, exact=True), lambda: BATCH, ROOM),
    "vmap": (lambda: ft.parallel(hungry(), PARTS, how="vmap"), lambda: BATCH, ROOM),
    "fused": (lambda: ft.parallel(hungry(), PARTS), lambda: BATCH, ROOM),
    "finished": (lambda: ft.parallel(hungry(), PARTS).finished, lambda: BATCH, ROOM),
    "too large": (lambda: ft.parallel(hungry(4), PARTS, how="threads", workers=4, exact=True), lambda: BATCH, 1),
    "too large, fused": (lambda: ft.parallel(hungry(), PARTS).finished, lambda: BATCH, 1),
    "too large, loop": (lambda: ft.accumulate(hungry(), PARTS), lambda: BATCH, 1),
}


def told(name: str) -> dict[str, Any]:
    """What comes of a case: without a limit, and twice with one."""
    make, batch, room = CASES[name]
    params, key = net_params(), ft.random.key(0)
    plenty = make()(params, batch(), key=key)
    grad, facts = make(), {"plenty": listed(plenty), "starved": [], "warnings": []}
    threads, space = (threading.active_count(), torch.get_num_threads()), address_space()
    if name == "stacks":
        # Not one thread can be started: the caller's own takes all parts.
        threading.stack_size((ROOM + 1) * UNIT)
    for given in [batch()] * 2:
        with warnings.catch_warnings(record=True) as caught, room_for(room):
            warnings.simplefilter("always")
            try:
                facts["starved"].append(listed(grad(params, given, key=key)))
            except (RuntimeError, MemoryError) as error:
                facts["error"] = f"{type(error).__name__}: {error}"
                facts["notes"] = list(getattr(error, "__notes__", []))
                facts["frames"] = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        facts["warnings"].append([f"{warning.category.__name__}: {warning.message}" for warning in caught])
    threading.stack_size(0)
    left = threading.active_count(), torch.get_num_threads()
    return facts | {"threads": [threads, left], "left": (address_space() - space) / UNIT}


def listed(gradient: Any) -> list[Any]:
    return [leaf.tolist() for leaf in ft.tree.leaves(gradient)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Memory has to be free again without the collector's help: a second attempt does not wait for it.
    gc.disable()
    print(json.dumps({name: told(name) for name in CASES}))
