"""What loading and training waited for, one for the other."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

from functrain.core.explain import readable


class Stats(NamedTuple):
    """What prefetching has done so far, and who waited for whom.

    - `items`: elements taken.
    - `waited`: seconds that whoever takes elements waited for one.
    - `idle`: seconds that loaders waited to begin a load, since `depth` or `memory` was used up; summed over `workers`.
    - `loading`: seconds spent loading, summed over `workers`.
    - `bytes`: bytes loaded; None where nobody had to know (neither `memory` nor `device` was given).
    - `workers`: threads that load.

    >>> print(Stats(items=100, waited=0.25, idle=12.5, loading=3.5, bytes=None, workers=1))
    100 items; waited for data 0.2 s, loaders idle 12.5 s, loading 3.5 s: loading keeps up, what takes the items is slower
    """

    items: int = 0
    waited: float = 0.0
    idle: float = 0.0
    loading: float = 0.0
    bytes: int | None = None
    workers: int = 1

    @property
    def bottleneck(self) -> str:
        """What one waits for: "loading", "training" (whatever takes the elements), or "neither" before any were taken."""
        if not self.items:
            return "neither"
        return "loading" if self.waited > self.idle / self.workers else "training"

    def __str__(self) -> str:
        size = "" if self.bytes is None else f", {readable(self.bytes)} loaded"
        by = f" by {self.workers} threads" if self.workers > 1 else ""
        seconds = f"waited for data {self.waited:.1f} s, loaders idle {self.idle:.1f} s, loading {self.loading:.1f} s{by}"
        verdict = {
            "neither": "",
            "loading": ": loading is the bottleneck, more workers= or a cheaper layout would help",
            "training": ": loading keeps up, what takes the items is slower",
        }
        return f"{self.items:,} items{size}; {seconds}{verdict[self.bottleneck]}"

    def plus(self, other: Stats) -> Stats:
        """The sum of two streams' figures; the workers are those of the later one."""
        size = other.bytes if self.bytes is None else self.bytes + (other.bytes or 0)
        waited, idle, loading = (ours + theirs for ours, theirs in zip(self[1:4], other[1:4]))
        return Stats(self.items + other.items, waited, idle, loading, size, other.workers)


class Clock:
    """One loader's time: it reads the clock only where it waits, so that loads cost no reading."""

    __slots__ = ("began", "bytes", "ended", "pause")

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.bytes = 0
        # Seconds waited, and since when it waits now: one value, since others read it at any moment.
        self.pause: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """The loader begins."""
        self.began = perf_counter()

    def end(self) -> None:
        """The loader ends."""
        self.ended = perf_counter()

    def spent(self) -> tuple[float, float]:
        """Seconds waited and seconds loading, so far."""
        if not self.began:
            return 0.0, 0.0
        waited, since = self.pause
        now = self.ended or perf_counter()
        idle = waited + (max(0.0, now - since) if since else 0.0)
        return idle, max(0.0, now - self.began - idle)


__all__ = ["Clock", "Stats"]
