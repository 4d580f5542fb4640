"""How much memory a piece of work takes: by torch's allocator, byte by byte, so that no test depends on a process's size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak(work: Callable[[], Any]) -> int:
    """Bytes on the CPU at the worst moment of `work()`, of those that it takes itself in this thread."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
