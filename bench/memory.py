"""Bench `memory`: how much an epoch over a large file adds to the process, against the budget that it was given.

Not times, but bytes. Each epoch runs in a process of its own, which has imported all that it needs before the first look.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

import functrain as ft
from bench.layouts import CHUNK, fields, options
from bench.race import Result, smoke

ROW, BLOCKS, BATCH, GOAL = 4096, 8, 64, 1.1
LAYOUTS = ("shuffle+gzip", "contiguous")


def run() -> list[Result]:
    """An epoch over 4 GiB in 512 MiB, for each layout: shuffled, prefetched, one budget for both."""
    size, limit = (64 * CHUNK, 8 * CHUNK) if smoke() else (4096 * CHUNK, 512 * CHUNK)
    return [result for layout in LAYOUTS for result in _measured(layout, size, limit)]


def _measured(layout: str, size: int, limit: int) -> list[Result]:
    work = f"not a time: bytes added by a shuffled, prefetched epoch over {size / 2**30:g} GiB, {layout}, 2 threads"
    peer = f"a budget of {limit >> 20} MiB"
    free = shutil.disk_usage(gettempdir()).free
    if free < size + (1 << 30):
        note = f"not run: it takes {size >> 20} MiB of disk, and {free >> 20} are free"
        return [Result("memory", work, peer, None, None, None, None, GOAL, note=note)]
    with _large(layout, size) as path:
        command = [sys.executable, "-c", f"from bench.memory import epoch; epoch({str(path)!r}, {limit})"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"the epoch failed: {done.stderr}")
    found = json.loads(done.stdout)
    if found["rows"] != [size // ROW, sum(range(size // ROW))]:
        raise AssertionError(f"the epoch has not each row once: {found['rows']}")
    kinds = {
        "resident": "all resident pages, a mapped file's too",
        "own": f"memory of its own (the budget counted {found['counted'] / limit:.2f} of its limit)",
    }
    return [
        Result("memory", f"{work}; {text}", peer, found[name] / limit, None, None, found["seconds"] * 1e6, GOAL)
        for name, text in kinds.items()
    ]


@contextmanager
def _large(layout: str, size: int) -> Iterator[Path]:
    """A file of `x` (N, 1024) float32 in a layout, a few blocks again and again, and `i` (N,) that numbers the rows."""
    import h5py

    count, rows = size // ROW, CHUNK // ROW
    blocks = np.split(fields(BLOCKS * CHUNK), BLOCKS)
    with TemporaryDirectory(prefix="functrain-bench-") as folder:
        path = Path(folder) / "large.h5"
        with h5py.File(path, "w") as file:
            chunks = None if layout == "contiguous" else (rows, 1024)
            x = file.create_dataset("x", (count, 1024), "f4", chunks=chunks, **options(layout))
            for start in range(0, count, rows):
                number = start // rows
                if chunks and number >= BLOCKS:
                    # The chunk that was compressed before, as it lies in the file.
                    mask, raw = x.id.read_direct_chunk(((number % BLOCKS) * rows, 0))
                    x.id.write_direct_chunk((start, 0), raw, mask)
                else:
                    x[start : start + rows] = blocks[number % BLOCKS]
            file["i"] = np.arange(count)
        yield path


def epoch(path: str, limit: int) -> None:
    """Run the epoch in this process and print what it took as JSON."""
    budget = ft.Budget(limit)
    # What is loaded at first use is no part of the epoch.
    with ft.hdf5(path, datasets=["i"]) as warm, ft.prefetch(warm.batch(2)) as batches:
        next(iter(batches))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, own, began, rows, total = _status(), 0, time.perf_counter(), 0, 0
    with ft.hdf5(path, threads=2, memory=budget) as source:
        shuffled = source.shuffle(seed=0, within=limit // 4).batch(BATCH)
        with ft.prefetch(shuffled, depth=4, memory=budget) as batches:
            for batch in batches:
                rows, total = rows + len(batch["x"]), total + int(batch["i"].sum())
                own = max(own, _status()["RssAnon"])
    seconds = time.perf_counter() - began
    found: dict[str, Any] = {
        "resident": _status()["VmHWM"] - before["VmRSS"],
        "own": own - before["RssAnon"],
        "counted": budget.peak,
        "rows": [rows, total],
        "seconds": seconds,
    }
    print(json.dumps(found))


def _status() -> dict[str, int]:
    """What the kernel says that this process holds, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].startswith(("Vm", "Rss"))}
