"""One rank of a training run that only writes down what it is given: run by test_resharding.py, and killed by it.

Arguments: folder, rank, number of ranks, first step, end. After each step it says so, and waits for a line:
ranks of a real run wait for each other's gradients.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import functrain as ft

BATCH = 16


@contextmanager
def batches(folder: Path) -> Iterator[ft.Source]:
    """A chunk-aware shuffle of one file, mixed with a full shuffle of another: each element once an epoch."""
    with ft.hdf5(folder / "chunked.h5", threads=2) as chunked, ft.hdf5(folder / "contiguous.h5") as contiguous:
        sources = {"chunked": chunked.shuffle(seed=1, within=8 * 4 * 10), "contiguous": contiguous.shuffle(seed=2)}
        yield ft.mix(sources, seed=3).batch(BATCH)


def given(folder: Path, rank: int, ranks: int, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
    """Each step from `start` on, and the ids that the rank is given for it."""
    with batches(folder) as whole, ft.prefetch(whole.part(rank, ranks), depth=4) as stream:
        for step, batch in enumerate(stream.between(start, stop), start):
            yield step, batch["id"].tolist()


def log(folder: Path, rank: int) -> Path:
    """Where a rank writes a line `[step, ids]` for each step."""
    return folder / f"{rank}.log"


def main(folder: Path, rank: int, ranks: int, start: int, stop: int) -> None:
    """Take the steps, and write down what each was given."""
    with open(log(folder, rank), "wb", buffering=0) as file:
        for step, ids in given(folder, rank, ranks, start, stop):
            file.write(json.dumps([step, ids]).encode() + b"\n")
            os.write(1, b"%d\n" % step)
            sys.stdin.readline()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
