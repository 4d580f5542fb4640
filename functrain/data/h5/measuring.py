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
# What `hdf5` may hold unless it is told otherwise.
_DEFAULT = 512 << 20


def by_functrain(path: str, name: str, extent: Extent, whole: int, seconds: float) -> Speeds:
    """The speeds of `hdf5` on one thread, of a dataset that has `whole` rows."""
    try:
        # Chunks that are remembered from batch to batch would not be in a dataset of many, nor would all of a large map be.
        fits = extent.run == 1 and whole * extent.size <= _DEFAULT
        forgetful = hdf5(path, name, memory=_DEFAULT if fits else 2 * extent.run * extent.size)
    except DataError:
        return Speeds(None, None)
    with forgetful, hdf5(path, name) as source:
        at_random = _at_random(lambda rows: forgetful.take(rows, 0), extent, whole, seconds)
        return Speeds(_in_order(lambda rows: source.take(rows, 0), extent, seconds), at_random)


def by_h5py(path: str, name: str, extent: Extent, whole: int, seconds: float) -> Speeds:
    """The speeds of h5py: slices, and random rows as it wants them, in rising order; nobody else has the file open."""
    import h5py

    with opened(path) as file:
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        access.set_chunk_cache(521, 0, 1.0)
        forgetful = h5py.Dataset(h5py.h5d.open(file.id, name.encode(), access))
        at_random = _at_random(lambda rows: forgetful[np.sort(rows)], extent, whole, seconds)
    with opened(path) as file:
        dataset = file[name]
        return Speeds(_in_order(lambda rows: dataset[rows[0] : rows[-1] + 1], extent, seconds), at_random)


def _in_order(take: Take, extent: Extent, seconds: float) -> float:
    # Whole chunks at a time: of the batches that lie in one, the first alone decodes it.
    stretch = -(-extent.batch // extent.run) * extent.run
    stop = extent.start + extent.rows
    work = []
    for start in range(extent.start, stop, stretch):
        end = min(start + stretch, stop)
        work.append([np.arange(first, min(first + extent.batch, end)) for first in range(start, end, extent.batch)])
    return _rate(take, work, seconds)


def _at_random(take: Take, extent: Extent, whole: int, seconds: float) -> float:
    runs = max(1, extent.rows // extent.run)
    count = int(min(extent.batch, runs, max(1, _CHUNKS_BYTES // max(1, extent.run * extent.size))))
    draw = np.random.default_rng(0)
    if extent.rows >= whole:
        # All of it is there: batches as they would be read.
        picks = (draw.choice(extent.rows, min(extent.batch, extent.rows), replace=False) for _ in range(64))
        return _rate(take, [[extent.start + pick] for pick in picks], seconds)
    work = []
    for _ in range(64):
        chosen = draw.choice(runs, count, replace=False) * extent.run + draw.integers(extent.run, size=count)
        work.append([extent.start + np.minimum(chosen, extent.rows - 1)])
    apart = _rate(take, work, seconds)
    # Of a batch of random rows, those in one chunk are decoded together.
    every = max(1.0, whole / extent.run)
    distinct = every * (1 - (1 - 1 / every) ** extent.batch)
    return apart * extent.batch / max(1.0, distinct)


def _rate(take: Take, work: list[list[np.ndarray]], seconds: float) -> float:
    """Rows a second: the most of any piece of work, of as many as there is time for. The first is to warm up, if not alone."""
    best, end = 0.0, time.perf_counter() + seconds
    for number, batches in enumerate(work):
        start = time.perf_counter()
        for batch in batches:
            take(batch)
        now = time.perf_counter()
        if number or len(work) == 1:
            best = max(best, sum(map(len, batches)) / max(now - start, 1e-9))
            if now > end:
                break
    return best


__all__ = ["Extent", "Speeds", "by_functrain", "by_h5py"]
