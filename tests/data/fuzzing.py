"""Reads damaged copies of HDF5 files: a program, which a crash of HDF5 or of a codec would end.

A file is read right, or refused with a `DataError` that names it. `python fuzzing.py FOLDER SEED COUNT SECONDS` takes the files
in a folder, with the numbers that they hold beside them (`.npz`), and stops after so many copies, or so much time.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from functrain.core.errors import DataError
from functrain.data import hdf5, readmmap

# A file's name tells what checksums cover: the bytes of chunks ("chunks"), all of it ("file"), or nothing.
CHUNKS, FILE = "chunks", "file"


class Original:
    """A whole file, and where its chunks lie."""

    def __init__(self, path: Path) -> None:
        self.name, self.bytes = path.stem, path.read_bytes()
        with np.load(f"{path}.npz") as arrays:
            self.truth = np.array(arrays["0"], arrays["0"].dtype.newbyteorder("="), order="C")
        spans: list[tuple[int, int]] = []
        with h5py.File(path) as file:
            dataset = file["0"]
            offset = dataset.id.get_offset()
            self.mapped = dataset.chunks is None and offset is not None
            if self.mapped:
                spans.append((offset, dataset.nbytes))
            elif dataset.chunks is not None:
                dataset.id.chunk_iter(lambda chunk: spans.append((chunk.byte_offset, chunk.size)))
        self.data = [place for start, size in spans for place in range(start, start + size)]
        within = {*self.data}
        # Most of a small file is zeros.
        self.records = [place for place, byte in enumerate(self.bytes) if byte and place not in within]
        self.anywhere = self.records + list(range(0, len(self.bytes), 5))

    def damaged(self, draw: random.Random) -> tuple[bytes, bool]:
        """A damaged copy, and whether a checksum covers all that was damaged."""
        if draw.random() < 0.1:
            return self.bytes[: draw.randrange(len(self.bytes))], FILE in self.name
        inside = bool(self.data) and draw.random() < 0.4
        places = self.data if inside else draw.choice([self.records, self.anywhere])
        data = bytearray(self.bytes)
        # At most one byte of each 16 bits: Fletcher's checksum takes ff ff for 00 00.
        for place in {draw.choice(places) // 2: None for _ in range(draw.choice([1, 1, 2, 8]))}:
            at = min(2 * place + draw.randrange(2), len(data) - 1)
            data[at] = draw.choice([0, 255, data[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
        return bytes(data), CHUNKS in self.name and (inside or FILE in self.name)


def attempt(read: Any, path: Path, truth: np.ndarray | None, outcomes: Counter[str]) -> None:
    """Read: what comes is a `DataError` that names the file, or numbers, the right ones where `truth` is given."""
    try:
        found = read()
    except DataError as error:
        if path.name not in str(error):
            raise
        outcomes["refused"] += 1
        return
    assert truth is None or (found.shape == truth.shape and found.tobytes() == truth.tobytes()), "other numbers, silently"
    outcomes["read"] += 1


def rows(path: Path, draw: random.Random) -> np.ndarray:
    """All rows, by several readings."""
    with hdf5(path, "0", threads=draw.choice([1, 1, 2]), memory=draw.choice([1, "1 MiB"])) as source:
        source(len(source) - 1)
        places = np.arange(min(len(source), 1000))
        back = source.take(places[::-1].copy(), 0)
        return np.zeros(0) if isinstance(back, dict) else np.array(back.numpy()[::-1])


def main(folder: Path, seed: int, count: int, seconds: float) -> None:
    draw = random.Random(seed)
    originals = [Original(path) for path in sorted(folder.glob("*.h5"))]
    target = folder / f"damaged {seed}.hdf5"
    # A damaged shape may claim terabytes: neither memory nor disk are to hold them.
    resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    outcomes: dict[str, Counter[str]] = {original.name: Counter() for original in originals}
    ends = time.monotonic() + seconds
    for number in range(count):
        original = originals[number % len(originals)]
        print(number, original.name, file=sys.stderr, flush=True)
        if time.monotonic() > ends:
            break
        faulthandler.dump_traceback_later(30, exit=True)
        data, covered = original.damaged(draw)
        target.write_bytes(data)
        attempt(lambda: rows(target, draw), target, original.truth if covered else None, outcomes[original.name])
        if original.mapped:
            attempt(lambda: np.array(readmmap(target, "0")), target, None, outcomes[original.name])
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
