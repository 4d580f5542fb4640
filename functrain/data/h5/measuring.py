"""How fast the rows of a dataset are read, by functrain and by h5py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import opened
from functrain.data.h5.source import hdf5

Take = Callable[[np.ndarray], object]


class Speeds(NamedTuple):
    """Rows a second, in order and in random batches; None where nothing reads them."""

    in_order: float | None
    at_random: float | None


class Extent(NamedTuple):
    """Rows from `start` on, that lie together `run` by `run`, in batches of `batch`; `size` bytes a row."""

    start: int
    rows: int
    run: int
    batch: int
    size: int


# Random rows are read from so many bytes of chunks at a time, each in another chunk where there are as many.
_CHUNKS_BYTES = 1 << 23


def by_functrain(path: str, name: str, extent: Extent, whole: int, seconds: float) -> Speeds:
    """The speeds of `hdf5` on one thread, which remembers no more than the chunks of one row; `whole` is the dataset's length."""
    try:
        source = hdf5(path, name, memory=max(1, extent.run * extent.size))
    except DataError:
        return Speeds(None, None)
    with source:
        return _speeds(lambda rows: source.take(rows, 0), extent, whole, seconds)


def by_h5py(path: str, name: str, extent: Extent, whole: int, seconds: float) -> Speeds:
    """The speeds of h5py: slices, and random rows as it wants them, in rising order."""
    with opened(path) as file:
        dataset = file[name]

        def take(rows: np.ndarray) -> object:
            together = rows[-1] - rows[0] == len(rows) - 1
            return dataset[rows[0] : rows[-1] + 1] if together else dataset[np.sort(rows)]

        return _speeds(take, extent, whole, seconds)


def _speeds(take: Take, extent: Extent, whole: int, seconds: float) -> Speeds:
    starts = range(extent.start, extent.start + extent.rows, extent.batch)
    stop = extent.start + extent.rows
    batches = [np.arange(start, min(start + extent.batch, stop)) for start in starts]
    in_order = _rate(take, batches, seconds)
    runs = max(1, extent.rows // extent.run)
    count = int(min(extent.batch, runs, max(1, _CHUNKS_BYTES // max(1, extent.run * extent.size))))
    draw = np.random.default_rng(0)
    scattered = []
    for _ in range(64):
        chosen = draw.choice(runs, count, replace=False) * extent.run + draw.integers(extent.run, size=count)
        scattered.append(extent.start + np.minimum(chosen, extent.rows - 1))
    apart = _rate(take, scattered, seconds)
    # Of a batch of random rows, those in one chunk are decoded together.
    every = max(1.0, whole / extent.run)
    distinct = every * (1 - (1 - 1 / every) ** extent.batch)
    return Speeds(in_order, apart * extent.batch / max(1.0, distinct))


def _rate(take: Take, batches: list[np.ndarray], seconds: float) -> float:
    """Rows a second, over as many batches as there is time for: at least one, the best of two halves."""
    best, rows, start = 0.0, 0, time.perf_counter()
    end, begun = start + seconds, start
    for batch in batches:
        take(batch)
        rows += len(batch)
        now = time.perf_counter()
        if now - begun > seconds / 4 or now > end or batch is batches[-1]:
            best, rows, begun = max(best, rows / max(now - begun, 1e-9)), 0, now
        if now > end:
            break
    return best


__all__ = ["Extent", "Speeds", "by_functrain", "by_h5py"]
