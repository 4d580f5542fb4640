"""Gradients that run out of memory: run by test_memory.py in a process of its own, whose limit no other test is to feel.

A loss takes scratch memory that it never writes to, so that address space runs out and the machine's memory does not.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import threading
import traceback
import warnings
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from instances import keyed_loss, net_batch, net_params

import functrain as ft
from functrain.core.deferred import Deferred

UNIT = 1 << 28
PARTS, SIZE = 4, 8
PARAMS, BATCH, KEY = net_params(), net_batch(SIZE), ft.random.key(0)


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def room_for(units: float) -> Any:
    """Within the block, `units` more scratch memories than there are now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + int(units * UNIT), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Together:
    """Lets the first `count` callers go on when all of them are there, or when one of them could not come."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)

    def __call__(self, take: Any) -> Any:
        try:
            scratch = take()
        except (RuntimeError, MemoryError):
            self.barrier.abort()
            raise
        if not self.barrier.broken:
            # Broken while it waits: another one did not get its memory.
            with warnings.catch_warnings():
                try:
                    self.barrier.wait()
                except threading.BrokenBarrierError:
                    pass
        return scratch


def report(grad: Any, room: float, batch: Any = BATCH, method: str = "__call__") -> dict[str, Any]:
    """What comes of a gradient with room for so much scratch memory, asked for twice."""
    told: dict[str, Any] = {"warnings": [], "threads": [threading.active_count()], "intra_op": [torch.get_num_threads()]}
    results, before = [], address_space()
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught, room_for(room):
            warnings.simplefilter("always")
            try:
                results.append(getattr(grad, method)(PARAMS, batch, key=KEY))
            except (RuntimeError, MemoryError) as error:
                told["error"] = f"{type(error).__name__}: {error}"
                told["notes"] = getattr(error, "__notes__", [])
                told["frames"] = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        told["warnings"].append([f"{warning.category.__name__}: {warning.message}" for warning in caught])
    told["threads"].append(threading.active_count())
    told["intra_op"].append(torch.get_num_threads())
    told["left"] = (address_space() - before) / UNIT
    plenty = getattr(grad, method)(PARAMS, batch, key=KEY) if results else None
    told["leaves"] = [[leaf.tolist() for leaf in ft.tree.leaves(result)] for result in results]
    told["unlimited"] = plenty and [leaf.tolist() for leaf in ft.tree.leaves(plenty)]
    return told
