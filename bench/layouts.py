"""HDF5 files to read in a bench: data that compresses as real data does, in every layout that is raced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

CHUNK = 1 << 20
Item = TypeVar("Item")
LAYOUTS = ("contiguous", "chunked", "gzip", "shuffle+gzip", "lzf", "zstd", "lz4", "blosc")


class File(NamedTuple):
    """A dataset `x` in a file of its own, what it holds, and how many of its rows make a chunk or a batch."""

    path: Path
    data: np.ndarray
    rows: int


def options(layout: str) -> dict[str, Any]:
    """What h5py's `create_dataset` takes for a layout, but for the chunks."""
    if layout in ("zstd", "lz4", "blosc"):
        import hdf5plugin

        plugins = {"zstd": hdf5plugin.Zstd(clevel=3), "lz4": hdf5plugin.LZ4(), "blosc": hdf5plugin.Blosc("lz4", 5, 1)}
        return {"compression": plugins[layout]}
    if layout in ("contiguous", "chunked"):
        return {}
    return {"compression": layout.removeprefix("shuffle+"), "shuffle": layout.startswith("shuffle+")}


@contextmanager
def written(data: np.ndarray, layout: str) -> Iterator[File]:
    """A file of `data`, cut into chunks of about a MiB where the layout has chunks; removed at the end."""
    import h5py

    rows = max(1, min(len(data), CHUNK // data[0].nbytes))
    with TemporaryDirectory(prefix="functrain-bench-") as folder:
        path = Path(folder) / "data.h5"
        chunks = None if layout == "contiguous" else (rows, *data.shape[1:])
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=data, chunks=chunks, **options(layout))
        yield File(path, data, rows)


def dataset(stack: ExitStack, path: Path) -> Any:
    """The dataset of such a file through h5py, open as long as the stack."""
    import h5py

    return stack.enter_context(h5py.File(path, "r"))["x"]


def threaded(
    stack: ExitStack, path: Path, threads: int, read: Callable[[Any, Item], Tensor]
) -> Callable[[Iterable[Item]], Iterable[Tensor]]:
    """What `read(dataset, item)` gives for items, in their order: h5py in threads, a handle each, which take items in turn."""
    handles: deque[Any] = deque(dataset(stack, path) for _ in range(threads))
    pool = stack.enter_context(ThreadPoolExecutor(threads))

    def taken(item: Item) -> Tensor:
        rows = handles.pop()
        try:
            return read(rows, item)
        finally:
            handles.append(rows)

    return lambda items: pool.map(taken, items)


def fields(size: int) -> np.ndarray:
    """Smooth signals with noise, as an instrument's converter rounds them: `(N, 1024)` float32, of `size` bytes."""
    rng, count = np.random.default_rng(0), max(1, size // 4096)
    time = np.linspace(0, 1, 1024, dtype=np.float32)
    found = 0.01 * rng.standard_normal((count, 1024), dtype=np.float32)
    for order in range(1, 7):
        height, phase = rng.standard_normal((count, 1), np.float32) / order, rng.random((count, 1), np.float32)
        found += height * np.sin(2 * np.pi * (order * time + phase), dtype=np.float32)
    return np.round(found * 512) / np.float32(512)


def images(size: int) -> np.ndarray:
    """Cuts of pictures whose spectrum falls with frequency as that of photographs: `(N, 64, 64, 3)` uint8."""
    rng, count, side = np.random.default_rng(1), max(1, size // (64 * 64 * 3)), 256
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
    noise = np.fft.rfft2(rng.standard_normal((8, 3, side, side)) + 2 * rng.standard_normal((8, 1, side, side)))
    pictures = np.fft.irfft2(noise / frequency**1.6, s=(side, side)).transpose(0, 2, 3, 1)
    pictures = (128 + 50 * pictures / pictures.std()).astype(np.float32)
    which, top, left = rng.integers([8, side - 64, side - 64], size=(count, 3)).T
    cuts = np.stack([pictures[n, y : y + 64, x : x + 64] for n, y, x in zip(which, top, left)])
    # A sensor's noise: cuts that overlap would otherwise be each other's copies.
    return np.clip(cuts + rng.standard_normal(cuts.shape, np.float32), 0, 255).astype(np.uint8)


def tokens(size: int) -> np.ndarray:
    """Tokens as frequent as words are (Zipf's law over 50 000): `(N, 512)` int32."""
    rng, count = np.random.default_rng(2), max(1, size // 2048)
    share = np.cumsum(1 / (np.arange(50_000) + 2.7))
    return np.searchsorted(share, rng.random((count, 512)) * share[-1]).astype(np.int32)
