"""Bench `hdf5`: batches out of HDF5 files, warm and cold, against who else reads such bytes.

The limits are contestants too: copying the same bytes, reading them, inflating and unshuffling the same chunks with nothing
around it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import functrain as ft
from bench.layouts import CHUNK, LAYOUTS, File, dataset, fields, images, threaded, tokens, written
from bench.race import Contestant, Result, compare, race, smoke

# Far less than an epoch: no chunk that one epoch decoded is there for the next.
MEMORY = 8 * CHUNK
BATCH = 256
H5PY, TWO, MEMMAP, TAKE = "h5py", "h5py, two threads", "np.memmap", "np.take on a memmap"
GRAIN, TENSORSTORE = "grain over h5py", "TensorStore, its threads, zarr of the same chunks"
ONE_THREAD, TWO_THREADS, WORKERS = "ours, 1 thread", "ours, 2 threads", "ours, prefetch with 2 workers"
COPIED, READ = "limit: copying the bytes in memory", "limit: reading the file's bytes"
KINDS = {"float32 rows of 4 KiB": fields, "uint8 images of 12 KiB": images, "int32 tokens, 2 KiB": tokens}
ZARR: dict[str, dict[str, Any] | None] = {
    "chunked": None,
    "gzip": {"id": "zlib", "level": 4},
    "zstd": {"id": "zstd", "level": 3},
    "blosc": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1},
}

Epoch = Callable[[], Iterable[Tensor]]


def run() -> list[Result]:
    """Race random rows, sequential epochs, every layout with every kind of data, and files that are not in memory."""
    return [*_random(), *_inflated(), *_table(), *_cold()]


def _size(size: int) -> int:
    return 2 * CHUNK if smoke() else size


# --- the contestants -------------------------------------------------------------------------------------------


def _opened(stack: ExitStack, file: File, size: int) -> dict[str, Epoch]:
    """Ours, decoded by whoever asks, and by two threads that read ahead of that."""
    sources = [stack.enter_context(ft.hdf5(file.path, "x", threads=threads, memory=MEMORY)) for threads in (1, 2)]
    return {name: partial(iter, source.batch(size)) for name, source in zip((ONE_THREAD, TWO_THREADS), sources)}


def _prefetched(stack: ExitStack, file: File, size: int) -> Epoch:
    """Ours, whole batches read by two threads side by side."""
    source = stack.enter_context(ft.hdf5(file.path, "x", memory=MEMORY)).batch(size)

    def epoch() -> Iterator[Tensor]:
        with ft.prefetch(source, depth=4, workers=2) as batches:
            yield from batches

    return epoch


def _sliced(rows: Any, size: int) -> Epoch:
    """Slice after slice of whatever gives arrays, copied where it does not."""
    return lambda: (torch.from_numpy(np.array(rows[start : start + size])) for start in range(0, len(rows), size))


def _h5py(stack: ExitStack, file: File, size: int) -> Epoch:
    rows = dataset(stack, file.path)
    # Into memory of its own, without the copy that others need.
    return lambda: (torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size))


def _h5py_threads(stack: ExitStack, file: File, size: int) -> Epoch:
    read = threaded(stack, file.path, 2, lambda rows, start: torch.from_numpy(rows[start : start + size]))
    return lambda: read(range(0, len(file.data), size))


def _grain(stack: ExitStack, file: File, size: int) -> Epoch:
    import grain

    # In the caller's thread: h5py lets one in at a time, and threads took longer.
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = grain.MapDataset.source(dataset(stack, file.path)).batch(size)
    return lambda: map(torch.from_numpy, batches.to_iter_dataset(alone))


def _tensorstore(stack: ExitStack, file: File, size: int, layout: str) -> Epoch:
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{file.path.parent}/zarr"},
        "metadata": {
            "shape": list(file.data.shape),
            "chunks": [file.rows, *file.data.shape[1:]],
            "dtype": file.data.dtype.str,
            "compressor": ZARR[layout],
        },
    }
    tensorstore.open(spec, create=True).result()[...].write(file.data).result()
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": MEMORY}})
    rows = tensorstore.open(spec, context=context, read=True).result()
    return lambda: (torch.from_numpy(rows[n : n + size].read().result()) for n in range(0, len(file.data), size))


def _inflating(stack: ExitStack, file: File, threads: int) -> Epoch:
    """Chunks that lie in memory, inflated and unshuffled, with nothing around it."""
    import deflate

    rows = dataset(stack, file.path)
    raw = [rows.id.read_direct_chunk(rows.id.get_chunk_info(n).chunk_offset)[1] for n in range(rows.id.get_num_chunks())]
    pool, unshuffle = stack.enter_context(ThreadPoolExecutor(threads)), _unshuffle()

    def decode(chunk: bytes) -> Tensor:
        found = np.empty((file.rows, *rows.shape[1:]), rows.dtype)
        unshuffle(deflate.zlib_decompress(chunk, found.nbytes), found, found.itemsize)
        return torch.from_numpy(found)

    return lambda: (map if threads == 1 else pool.map)(decode, raw)


def _unshuffle() -> Callable[[bytes, np.ndarray, int], None]:
    try:
        from zlib_into import unshuffle
    except ImportError:
        # As fast as NumPy does it.
        def unshuffle(planes: bytes, found: np.ndarray, width: int) -> None:
            found.view(np.uint8).reshape(-1, width)[...] = np.frombuffer(planes, np.uint8).reshape(width, -1).T

    return unshuffle


def _checked(epochs: Mapping[str, Epoch], data: np.ndarray) -> dict[str, Contestant]:
    """Epochs as contestants, once it is sure that all give the same rows."""
    for name, epoch in epochs.items():
        place = 0
        for batch in epoch():
            if not np.array_equal(batch.numpy(), data[place : place + len(batch)]):
                raise AssertionError(f"{name} gives other rows from {place} on")
            place += len(batch)
        if place != len(data):
            raise AssertionError(f"{name} gives {place} rows of {len(data)}")
    return {name: partial(_consumed, epoch) for name, epoch in epochs.items()}


def _consumed(epoch: Epoch) -> None:
    deque(epoch(), maxlen=0)


# --- warm ------------------------------------------------------------------------------------------------------


def _random() -> list[Result]:
    """Shuffled batches of a contiguous dataset: ours computes its order, theirs is there."""
    with ExitStack() as stack:
        file = stack.enter_context(written(fields(_size(128 * CHUNK)), "contiguous"))
        contestants = _drawn(stack, file)
        times = race(contestants, rounds=21, turn=0.1)
    goals = {"h5py fancy index": 0.06, TAKE: 1.05}
    return compare("hdf5", f"random batches of {BATCH}, contiguous HDF5, 4 KiB rows", times, "ours", goals)


def _drawn(stack: ExitStack, file: File) -> dict[str, Contestant]:
    """Those who read the next random batch at each call."""
    # The map of the file fits into the budget, as np.memmap has it: else rows are read one by one.
    source = stack.enter_context(ft.hdf5(file.path, "x"))
    order = np.array([int(row) for row in ft.arrays(torch.arange(len(file.data))).shuffle(seed=0)])
    picks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    ascending = [np.argsort(pick) for pick in picks]
    rows, mapped, batches = dataset(stack, file.path), _memmap(file.path), source.shuffle(seed=0).batch(BATCH)

    def fancy(n: int) -> Tensor:
        # h5py takes indices in ascending order alone.
        found = np.empty((len(picks[n]), *file.data.shape[1:]), file.data.dtype)
        found[ascending[n]] = rows[picks[n][ascending[n]]]
        return torch.from_numpy(found)

    readers: dict[str, Callable[[int], Tensor]] = {
        "ours": batches,
        "h5py fancy index": fancy,
        TAKE: lambda n: torch.from_numpy(np.take(mapped, picks[n], axis=0)),
    }
    for name, read in readers.items():
        if not np.array_equal(read(len(picks) - 1).numpy(), file.data[picks[-1]]):
            raise AssertionError(f"{name} gives other rows")
    return {name: partial(_next, read, itertools.cycle(range(len(picks)))) for name, read in readers.items()}


def _next(read: Callable[[int], Tensor], places: Iterator[int]) -> Tensor:
    return read(next(places))


def _memmap(path: Path) -> np.ndarray:
    with ExitStack() as stack:
        rows = dataset(stack, path)
        return np.memmap(path, rows.dtype, "r", rows.id.get_offset(), rows.shape)


def _inflated() -> list[Result]:
    """Sequential batches of a chunk each out of a shuffled and gzipped dataset, on one thread and on two."""
    with ExitStack() as stack:
        file = stack.enter_context(written(fields(_size(64 * CHUNK)), "shuffle+gzip"))
        limits = {n: f"limit: inflating and unshuffling alone, {n} thread{'s'[: n - 1]}" for n in (1, 2)}
        epochs = {
            **_opened(stack, file, file.rows),
            WORKERS: _prefetched(stack, file, file.rows),
            H5PY: _h5py(stack, file, file.rows),
            TWO: _h5py_threads(stack, file, file.rows),
            **{name: _inflating(stack, file, n) for n, name in limits.items()},
        }
        times = race(_checked(epochs, file.data), rounds=11, turn=0.2)
    work = f"sequential batches of {file.rows}, shuffle+gzip, 4 KiB rows"
    return [
        *compare("hdf5", f"{work}; {ONE_THREAD}", times, ONE_THREAD, {H5PY: 0.36, limits[1]: None}),
        *compare("hdf5", f"{work}; {TWO_THREADS}", times, TWO_THREADS, {TWO: 0.19, limits[2]: None}),
        *compare("hdf5", f"{work}; {WORKERS}", times, WORKERS, {TWO: 0.19, limits[2]: None}),
    ]


def _table() -> list[Result]:
    """Sequential epochs in batches of a quarter of a chunk, over every layout and kind of data."""
    results = []
    for kind, make in KINDS.items():
        data = make(_size(24 * CHUNK))
        for layout in LAYOUTS:
            with ExitStack() as stack:
                file = stack.enter_context(written(data, layout))
                results += _cell(stack, file, f"{kind}, {layout}", layout)
    return results


def _cell(stack: ExitStack, file: File, name: str, layout: str) -> list[Result]:
    size = max(1, file.rows // 4)
    epochs = {**_opened(stack, file, size), H5PY: _h5py(stack, file, size)}
    if layout == "contiguous":
        epochs[MEMMAP], epochs[COPIED] = _sliced(_memmap(file.path), size), _sliced(file.data, size)
    if file.data.dtype == np.float32:
        epochs[GRAIN] = _grain(stack, file, size)
        if layout in ZARR:
            epochs[TENSORSTORE] = _tensorstore(stack, file, size, layout)
    times = race(_checked(epochs, file.data), rounds=5, turn=0.05)
    work = f"sequential epoch, batches of {size}; {name}"
    others = dict.fromkeys(peer for peer in epochs if peer not in (ONE_THREAD, TWO_THREADS, H5PY))
    # Where nothing is decoded there is nothing for a second thread.
    alone = others if layout in ("contiguous", "chunked") else {}
    results = compare("hdf5", f"{work}; {ONE_THREAD}", times, ONE_THREAD, {H5PY: None, **alone})
    return results if alone else results + compare("hdf5", f"{work}; {TWO_THREADS}", times, TWO_THREADS, {H5PY: None, **others})


# --- cold ------------------------------------------------------------------------------------------------------


def _cold() -> list[Result]:
    """Files opened anew after their pages were dropped: what a first epoch finds."""
    makers: dict[str, Callable[[ExitStack, File], Epoch]] = {
        TWO_THREADS: lambda stack, file: _opened(stack, file, BATCH)[TWO_THREADS],
        H5PY: lambda stack, file: _h5py(stack, file, BATCH),
        MEMMAP: lambda stack, file: _sliced(_memmap(file.path), BATCH),
    }
    results = []
    for layout in ("contiguous", "shuffle+gzip"):
        names = [name for name in makers if name != MEMMAP or layout == "contiguous"]
        with written(fields(_size(64 * CHUNK)), layout) as file:
            contestants = _checked({name: partial(_afresh, file, makers[name]) for name in names}, file.data)
            contestants[READ] = partial(_read, file.path)
            left: list[float] = []
            times = race(contestants, rounds=5, before=partial(_note_dropped, file.path, left))
        work = f"cold: sequential epoch, opening included, {layout}, 4 KiB rows; {TWO_THREADS}"
        peers = dict.fromkeys(peer for peer in contestants if peer != TWO_THREADS)
        if max(left) > 0.1:
            note = f"not run: {max(left):.0%} of the file's pages stayed in memory"
            results += [Result("hdf5", work, peer, None, None, None, None, note=note) for peer in peers]
        else:
            results += compare("hdf5", work, times, TWO_THREADS, peers)
    return results


def _afresh(file: File, make: Callable[[ExitStack, File], Epoch]) -> Iterator[Tensor]:
    with ExitStack() as stack:
        yield from make(stack, file)()


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        piece = bytearray(CHUNK)
        while file.readinto(piece):
            pass


def _note_dropped(path: Path, left: list[float]) -> None:
    left.append(dropped(path))


def dropped(path: Path) -> float:
    """Have the kernel drop a file's pages from its cache; gives the share that stayed."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            held = (ctypes.c_ubyte * count)()
            start = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(start))
            del start
            if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(len(mapped)), held):
                raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in held) / count
