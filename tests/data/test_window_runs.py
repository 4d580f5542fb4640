"""Which windows are cheapest read together: those that begin in one chunk."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.data.runs import Runs


class Laid(ft.Source):
    """Numbers that lie in runs."""

    def __init__(self, stretches: list[tuple[int, int]]) -> None:
        self.laid = Runs(tuple(stretches), 8)
        self.length = self.laid.length

    def get(self, i: int, epoch: int) -> object:
        return np.int64(i)

    def runs(self) -> Runs:
        return self.laid


laid = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=4)


def by_run(starts: list[int], ends: list[int]) -> list[int]:
    """How many of `starts` lie in each run, counted one by one."""
    counts = [sum(first <= start < last for start in starts) for first, last in itertools.pairwise([0, *ends])]
    return [count for count in counts if count]


def check(windows: ft.Source, starts: list[int], ends: list[int]) -> None:
    expected, found = by_run(starts, ends), windows.runs()
    if found is None:
        assert set(expected) == {1}
        return
    assert np.diff(found.ends(), prepend=0).tolist() == expected
    assert found.length == len(windows)


@given(laid, st.integers(1, 9), st.integers(1, 12))
def test_windows_belong_to_the_run_in_which_they_begin(stretches: list[tuple[int, int]], size: int, stride: int) -> None:
    source = Laid(stretches)
    size = min(size, len(source))
    windows = source.windows(size, stride)
    check(windows, [n * stride for n in range(len(windows))], source.laid.ends().tolist())


@given(st.lists(laid, min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 12))
def test_windows_of_episodes_do_so_too(parts: list[list[tuple[int, int]]], size: int, stride: int) -> None:
    sources = [Laid(stretches) for stretches in parts]
    size = min(size, max(map(len, sources)))
    windows = ft.episodes(sources).windows(size, stride)
    starts, ends, first = [], [], 0
    for source in sources:
        starts += [first + start for start in range(0, len(source) - size + 1, stride)]
        ends += [first + end for end in source.laid.ends().tolist()]
        first += len(source)
    check(windows, starts, ends)


def test_windows_over_chunks_are_shuffled_by_chunks(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.h5" for name in "ab"]
    for number, path in enumerate(paths):
        ft.h5write(path, {"x": np.arange(1000) + 10_000 * number}, chunks=100, compression="gzip")
    windows = ft.episodes(ft.hdf5(paths)).windows(10, stride=5)
    # Room for four chunks of 100 numbers.
    shuffled = windows.shuffle(seed=0, within=4 * 100 * 8)
    starts = [int(window["x"][0]) for window in shuffled]
    assert sorted(starts) == [10_000 * number + start for number in range(2) for start in range(0, 991, 5)]
    assert starts != sorted(starts)
    # Of five blocks the first holds the windows of four chunks; a full shuffle would show nearly all twenty.
    assert len({start // 100 for start in starts[:75]}) == 4
    assert 0.5 < shuffled.quality < 1
