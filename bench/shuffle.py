"""Bench `shuffle`: shuffled batches out of a chunked, gzipped HDF5 file, against PyTorch's DataLoader over h5py."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

import functrain as ft
from bench.layouts import CHUNK, dataset, fields, threaded, written
from bench.race import Result, compare, race, smoke
from functrain.data.order import Shuffle

BATCH = 64
# Theirs would take minutes for an epoch: so many batches of it.
BATCHES = 4
WITHIN, MEMORY = 16 * CHUNK, 48 * CHUNK
ROWS, SORTED = "DataLoader, 2 workers, h5py row by row", "DataLoader, 2 workers, h5py, sorted batches"
THREADS = "h5py, sorted batches, 2 threads"


def run() -> list[Result]:
    """Race the ways to shuffled batches: an epoch of ours, some batches of theirs, by the time a batch."""
    data = fields(8 * CHUNK if smoke() else 128 * CHUNK)
    data[:, 0] = np.arange(len(data))
    with ExitStack() as stack:
        file = stack.enter_context(written(data, "shuffle+gzip"))
        threads = threaded(stack, file.path, 2, _together)
        contestants = {
            "ours": lambda: _consumed(_epoch(file.path)),
            ROWS: partial(_consumed, _loader(_Rows(file.path))),
            SORTED: partial(_consumed, _loader(_Sorted(file.path), collate_fn=_as_it_is)),
            THREADS: lambda: _consumed(threads(_drawn(len(data)))),
        }
        _check(_epoch(file.path), len(data))
        quality = _shuffled(stack.enter_context(ft.hdf5(file.path, "x"))).quality
        times = race(contestants, rounds=5, turn=0.1)
    epoch = -(-len(data) // BATCH)
    each = {name: [seconds / (epoch if name == "ours" else BATCHES) for seconds in row] for name, row in times.items()}
    work = (
        f"a shuffled batch of {BATCH}, shuffle+gzip, 4 KiB rows, {len(data) * 4096 >> 20} MiB in chunks of 1 MiB; "
        f"within {WITHIN >> 20} MiB, 2 threads, quality {quality:.3f}"
    )
    return compare("shuffle", work, each, "ours", {ROWS: 0.10, SORTED: None, THREADS: None})


def _shuffled(source: ft.Source) -> Shuffle:
    return source.shuffle(seed=0, within=WITHIN)


def _epoch(path: Path) -> Iterator[Tensor]:
    """An epoch of ours, the file opened anew: no chunk is there from the epoch before."""
    memory = ft.Budget(MEMORY)
    with (
        ft.hdf5(path, "x", threads=2, memory=memory) as source,
        ft.prefetch(_shuffled(source).batch(BATCH), depth=4, memory=memory) as batches,
    ):
        yield from batches


def _consumed(batches: Iterable[object]) -> None:
    deque(batches, maxlen=0)


def _check(epoch: Iterable[Tensor], rows: int) -> None:
    """Each row is in the epoch once; the first column numbers them."""
    found = torch.cat([batch[:, 0] for batch in epoch])
    if not torch.equal(found.sort().values, torch.arange(rows, dtype=found.dtype)):
        raise AssertionError("the epoch has not each row once")


# --- theirs ----------------------------------------------------------------------------------------------------


class _Rows(Dataset):  # type: ignore[type-arg]
    """What one finds in most programs: the file opened in each worker, a row at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, None
        with ExitStack() as stack:
            self.length = len(dataset(stack, path))

    def __len__(self) -> int:
        return self.length

    @property
    def rows(self) -> Any:
        if self.found is None:
            self.found = dataset(ExitStack(), self.path)
        return self.found

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.rows[i])


class _Sorted(_Rows):
    """The better way: a batch at a time, in the order that h5py asks for."""

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return _together(self.rows, np.asarray(indices))


def _together(rows: Any, indices: np.ndarray) -> Tensor:
    order = np.argsort(indices)
    found = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
    found[order] = rows[indices[order]]
    return torch.from_numpy(found)


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


def _loader(dataset: _Rows, **how: Any) -> DataLoader[Tensor]:
    some = RandomSampler(dataset, num_samples=min(len(dataset), BATCH * BATCHES))
    return DataLoader(dataset, BATCH, sampler=some, num_workers=2, persistent_workers=True, **how)


def _drawn(rows: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows)[: BATCH * BATCHES].reshape(-1, BATCH)
