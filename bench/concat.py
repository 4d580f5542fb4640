"""Bench `concat`: joining files by their stored bytes, against copying these, and against decoding and encoding again."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

import functrain as ft
from bench.race import Result, compare, race, smoke

PARTS = 4
ROW = 1024
GZIP = {"chunks": (256, ROW), "compression": "gzip", "compression_opts": 4, "shuffle": True}
CP, CP_SYNC, RECODE = "cp", "cp, then fsync", "h5py, decoded and encoded again"


def run() -> list[Result]:
    """Race both kinds of files, on the disk of the temporary directory and in memory, where nothing waits for a disk."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        results += _raced(Path(folder), "on disk", "chunks of 1 MiB, shuffle+gzip", _gzip, recode=True)
        results += _raced(Path(folder), "on disk", "contiguous", _contiguous)
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            results += _raced(Path(folder), "in memory", "chunks of 1 MiB, shuffle+gzip", _gzip)
            results += _raced(Path(folder), "in memory", "contiguous", _contiguous)
    return results


def _raced(folder: Path, place: str, kind: str, make: Callable[[Path, int], None], recode: bool = False) -> list[Result]:
    """Ours against `cp`, and `cp` that syncs as ours does; against recoding, on a part of the files."""
    parts = [folder / f"{number}.h5" for number in range(PARTS)]
    rows = 256 if smoke() else 16_384
    for part in parts:
        make(part, rows)
    size = sum(part.stat().st_size for part in parts)
    contestants = {
        "ours": lambda: ft.h5concat(folder / "joined.h5", parts, overwrite=True),
        CP: lambda: _copied(parts, sync=False),
        CP_SYNC: lambda: _copied(parts, sync=True),
    }
    times = race(contestants, rounds=11, turn=0.3)
    # What `cp` leaves in the system's cache, ours has on the disk: of a disk that is the difference.
    goals = {CP: None, CP_SYNC: 1.3} if place == "on disk" else {CP: 1.3}
    results = compare("concat", f"{PARTS} files, {size / 1e6:.0f} MB {place}: {kind}", times, "ours", goals)
    if recode:
        results += _recoded(folder, parts[:1] * 2, kind)
    for path in folder.iterdir():
        path.unlink()
    return results


def _recoded(folder: Path, parts: list[Path], kind: str) -> list[Result]:
    contestants = {
        "ours": lambda: ft.h5concat(folder / "joined.h5", parts, overwrite=True),
        RECODE: lambda: _encoded(folder / "encoded.h5", parts),
    }
    for contestant in contestants.values():
        contestant()
    with h5py.File(folder / "joined.h5") as ours, h5py.File(folder / "encoded.h5") as theirs:
        assert ours["x"].chunks == theirs["x"].chunks
        assert np.array_equal(ours["x"][:300], theirs["x"][:300])
    times = race(contestants, rounds=5, turn=0.0)
    size = sum(part.stat().st_size for part in parts)
    return compare("concat", f"{len(parts)} files, {size / 1e6:.0f} MB on disk: {kind}", times, "ours", {RECODE: 0.02})


# --- contestants ---------------------------------------------------------------------------------------------


def _copied(parts: list[Path], sync: bool) -> None:
    for part in parts:
        subprocess.run(["cp", part, part.with_suffix(".copy")], check=True)
    for part in parts if sync else ():
        descriptor = os.open(part.with_suffix(".copy"), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _encoded(target: Path, parts: list[Path]) -> None:
    with h5py.File(target, "w") as file:
        lengths = []
        for part in parts:
            with h5py.File(part) as source:
                lengths.append(len(source["x"]))
        dataset = file.create_dataset("x", (sum(lengths), ROW), "f4", **GZIP)
        start = 0
        for part, length in zip(parts, lengths):
            with h5py.File(part) as source:
                for first in range(0, length, 256):
                    dataset[start + first : start + min(first + 256, length)] = source["x"][first : first + 256]
            start += length


# --- files ---------------------------------------------------------------------------------------------------


def _numbers(rows: int) -> np.ndarray:
    """Measurements as they come: noise of a few digits around a curve."""
    draw = np.random.default_rng(0)
    return (np.sin(np.arange(rows * ROW) / 1e3) + draw.normal(scale=0.01, size=rows * ROW)).astype("f4").reshape(rows, ROW)


def _gzip(path: Path, rows: int) -> None:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", (rows, ROW), "f4", **GZIP)
        # The same 4 MiB over and over: what they hold does not matter to who copies them.
        block = _numbers(1024)
        for start in range(0, rows, 1024):
            dataset[start : start + 1024] = block[: rows - start]


def _contiguous(path: Path, rows: int) -> None:
    block = _numbers(256)
    ft.h5write(path, (block for _ in range(rows // 256)), group="x", length=rows)
