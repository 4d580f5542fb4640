"""Files that another process appends to: the numbers are right at every moment, and the length holds still."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import functrain as ft
from functrain.data.laws import check_source

# Rows follow from their number: x[i] = [3 i, 3 i + 1, 3 i + 2], y[i] = -i.
WRITER = """
import sys
import h5py, numpy as np

path, total, piece, asked = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "asked"
with h5py.File(path, "w", libver="latest") as file:
    x = file.create_dataset("x", (0, 3), "i8", maxshape=(None, 3), chunks=(16, 3), compression="gzip", fletcher32=True)
    y = file.create_dataset("y", (0,), "i8", maxshape=(None,), chunks=(16,))
    file.swmr_mode = True
    length = 0
    while length < total:
        new = np.arange(length, min(total, length + piece))
        for dataset, rows in ((x, 3 * new[:, None] + np.arange(3)), (y, -new)):
            dataset.resize(new[-1] + 1, axis=0)
            dataset[length:] = rows
            dataset.flush()
        length = int(new[-1]) + 1
        if length == len(new) or asked:
            print(length, flush=True)
        if asked:
            sys.stdin.readline()
"""


def writing(path: Path, total: int, piece: int, asked: bool) -> subprocess.Popen[str]:
    """A writer that has written its first piece; with `asked`, it writes another one for each line."""
    command = [sys.executable, "-c", WRITER, str(path), str(total), str(piece), "asked" if asked else "free"]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert told(writer) == piece
    return writer


def told(writer: subprocess.Popen[str]) -> int:
    assert writer.stdout is not None
    return int(writer.stdout.readline())


def more(writer: subprocess.Popen[str]) -> int:
    assert writer.stdin is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    return told(writer)


def check(source: ft.Source) -> None:
    numbers = np.arange(len(source))
    batch = source.take(numbers, 0)
    assert np.array_equal(batch["x"].numpy(), 3 * numbers[:, None] + np.arange(3))
    assert np.array_equal(batch["y"].numpy(), -numbers)
    backwards = source.take(numbers[::-3].copy(), 0)
    assert np.array_equal(backwards["y"].numpy(), -numbers[::-3])


def test_the_length_holds_still_until_it_is_asked_for_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = writing(path, 200, 21, asked=True)
    try:
        first = ft.hdf5(path, swmr=True)
        kept = [first]
        for expected in range(42, 200, 21):
            assert more(writer) == expected
            for source in kept:
                check(source)
            assert [len(source) for source in kept] == list(range(21, expected, 21))
            kept.append(kept[-1].refreshed())
            assert len(kept[-1]) == expected
            check(kept[-1])
        check_source(kept[3])
        # One that was opened with its length, as a run that is resumed does it.
        assert len(ft.hdf5(path, swmr=True, length=50)) == 50
        assert len(ft.hdf5(path, swmr=True, length=50).refreshed()) == 189
        for source in kept:
            source.close()
        with pytest.raises(ft.DataError, match="was closed"):
            first(0)
    finally:
        writer.communicate(timeout=60)


@pytest.mark.parametrize("piece", [5, 16, 40])
def test_while_a_writer_appends_every_number_read_is_right(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "a.h5"
    total = 120 * piece
    writer = writing(path, total, piece, asked=False)
    lengths = [0]
    try:
        source = ft.hdf5(path, swmr=True, memory="64 KiB")
        while lengths[-1] < total:
            # A writer that is gone has written all: what is seen after this look at it is the end.
            ended = writer.poll() is not None
            source = source.refreshed()
            check(source)
            lengths.append(len(source))
            assert lengths[-1] >= lengths[-2]
            assert lengths[-1] == total or not ended
    finally:
        writer.communicate(timeout=60)
    assert writer.returncode == 0
    with h5py.File(path) as file:
        assert file["x"].shape == (total, 3)


def test_datasets_of_which_one_is_ahead_have_the_length_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("x", data=np.arange(10), maxshape=(None,), chunks=(4,))
        file.create_dataset("y", data=np.arange(8), maxshape=(None,), chunks=(4,))
    assert len(ft.hdf5(path, swmr=True)) == 8
    with pytest.raises(ft.DataError, match="differ in length"):
        ft.hdf5(path)
