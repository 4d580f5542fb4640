"""Which parts of which files make up a joined dataset, and where in it they lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import intact
from functrain.data.h5.layout import check_chunks
from functrain.data.h5.members import Members
from functrain.data.h5.packed import PACKING
from functrain.data.h5.sequences import numbers_in
from functrain.data.h5.virtual import check_virtual

if TYPE_CHECKING:
    import h5py

Shape = tuple[int, ...]
# Sources side by side: rows along the first axis to join along, in each row along the second.
Grid = Sequence[Sequence[Members]]


@dataclass(frozen=True)
class Part:
    """A dataset, from element `start` of the joined one on."""

    dataset: h5py.Dataset
    path: str
    start: Shape

    @property
    def bytes(self) -> int:
        """The size of its elements."""
        return int(self.dataset.size) * self.dataset.dtype.itemsize

    @property
    def region(self) -> tuple[slice, ...]:
        """Where it lies in the joined dataset."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.dataset.shape))


@dataclass(frozen=True)
class Joined:
    """A dataset to write: the parts of it in order; `dtype` is None where all parts have the first one's."""

    name: str
    shape: Shape
    dtype: np.dtype | None
    parts: tuple[Part, ...]

    @property
    def model(self) -> h5py.Dataset:
        """The first part that there is: layout, dtype and attributes are its."""
        return self.parts[0].dataset

    @property
    def gaps(self) -> bool:
        """Whether there are elements that no part gives."""
        return sum(math.prod(part.dataset.shape) for part in self.parts) < math.prod(self.shape)


def joined(grid: Grid, axes: tuple[int, int | None], filled: bool) -> Iterator[Joined]:
    """Every dataset of the files, joined; what is missing or too short is an error unless it is `filled`.

    Raises `DataError` for datasets that do not fit together, and names what differs where.
    """
    first = grid[0][0]
    every = dict.fromkeys(name for row in grid for members in row for name in members.datasets)
    for members in itertools.chain.from_iterable(grid):
        for name in every:
            if not filled and (name in members.datasets) != (name in first.datasets):
                has, lacks = (first.path, members.path) if name in first.datasets else (members.path, first.path)
                raise DataError(
                    f"dataset {name!r} is in {has!r}, but not in {lacks!r}: all sources must hold the same datasets, "
                    "unless fill= is given"
                )
    for name in every:
        yield _Joining(name, grid, axes, filled).joined()


class _Joining:
    """The parts of one dataset, as they are fitted together."""

    def __init__(self, name: str, grid: Grid, axes: tuple[int, int | None], filled: bool) -> None:
        self.name, self.grid, self.filled = name, grid, filled
        self.path, self.model = next((m.path, m.datasets[name]) for row in grid for m in row if name in m.datasets)
        with intact(f"dataset {name!r} in {self.path!r}"):
            self.axes = [_axis(name, self.path, self.model, axis) for axis in axes if axis is not None]
        if len(set(self.axes)) < len(self.axes):
            raise DataError(f"dataset {name!r} has shape {self.model.shape}: axes {axes} are the same one")
        self.given = axes
        self.cells = [[members.datasets.get(name) for members in row] for row in grid]

    def joined(self) -> Joined:
        for row, members in zip(self.cells, self.grid):
            for dataset, one in zip(row, members):
                if dataset is not None:
                    self._check(dataset, one.path)
        down, across = self.axes[0], (self.axes[1] if len(self.axes) > 1 else None)
        heights = [self._common(row, down, range(len(row)), number) for number, row in enumerate(self.cells)]
        for row, height, members in zip(self.cells, heights, self.grid):
            uneven = [dataset.shape[down] for dataset in row if dataset is not None and dataset.shape[down] != height]
            if uneven and not self.filled:
                raise DataError(
                    f"dataset {self.name!r} has {height} and {uneven[0]} elements along axis {down} in the row of "
                    f"{members[0].path!r}: give fill= to pad the shorter ones"
                )
        widths = [self._widths(number, across) for number in range(len(self.cells))]
        there = [dataset for row in self.cells for dataset in row if dataset is not None]
        shape = [max(sizes) for sizes in zip(*(dataset.shape for dataset in there))]
        shape[down] = sum(heights)
        if across is not None:
            totals = [sum(row) for row in widths]
            shape[across] = max(totals)
            if not self.filled and len(set(totals)) > 1:
                raise DataError(
                    f"dataset {self.name!r} has rows of {totals} elements along axis {across}: give fill= to pad them"
                )
        return Joined(self.name, tuple(shape), self._dtype(), tuple(self._parts(heights, widths, down, across)))

    def _parts(self, heights: list[int], widths: list[list[int]], down: int, across: int | None) -> Iterator[Part]:
        tops = itertools.accumulate(heights, initial=0)
        for row, members, top, wide in zip(self.cells, self.grid, tops, widths):
            lefts = itertools.accumulate(wide, initial=0)
            for dataset, one, left in zip(row, members, lefts):
                start = [0] * len(self.model.shape)
                start[down] = top
                if across is not None:
                    start[across] = left
                if dataset is not None:
                    yield Part(dataset, one.path, tuple(start))

    # --- how long what is missing is --------------------------------------------------------------------------

    def _widths(self, number: int, across: int | None) -> list[int]:
        if across is None:
            return [0] * len(self.cells[number])
        columns = [[row[place] if place < len(row) else None for row in self.cells] for place in range(len(self.cells[number]))]
        return [
            dataset.shape[across] if dataset is not None else self._common(columns[place], across, [place], number, 1)
            for place, dataset in enumerate(self.cells[number])
        ]

    def _common(
        self, beside: Sequence[h5py.Dataset | None], axis: int, places: Sequence[int], number: int, which: int = 0
    ) -> int:
        """The length of a row, or of what is missing in a column: that of its neighbours, or of what else is in its files."""
        known = [dataset.shape[axis] for dataset in beside if dataset is not None]
        if known:
            return max(known)
        others = {
            length
            for place in places
            for dataset in self.grid[number][place].datasets.values()
            if (length := _length(dataset, self.given[which])) is not None
        }
        path = self.grid[number][places[0]].path
        if len(others) != 1:
            what = f"datasets of lengths {sorted(others)}" if others else "no dataset"
            raise DataError(
                f"dataset {self.name!r} is not in {path!r}, and how much is to be filled cannot be told: that file has {what} "
                f"along axis {self.given[which]}"
            )
        return others.pop()

    # --- what must be the same --------------------------------------------------------------------------------

    def _check(self, dataset: h5py.Dataset, path: str) -> None:
        with intact(f"dataset {self.name!r} in {path!r}"):
            check_chunks(dataset)
            check_virtual(dataset)
            self._same(dataset, path)

    def _same(self, other: h5py.Dataset, path: str) -> None:
        name, model, first = self.name, self.model, self.path
        # To NumPy, sequences of any numbers are objects.
        inner = [numbers_in(dataset.dtype) for dataset in (model, other)]
        if inner[0] != inner[1] or (other.dtype != model.dtype and (not self.filled or "_Unsigned" in model.attrs)):
            kinds = [f"sequences of {kind}" if kind else dataset.dtype for kind, dataset in zip(inner, (model, other))]
            raise DataError(f"dataset {name!r} is {kinds[0]} in {first!r}, but {kinds[1]} in {path!r}: convert one of them")
        self._stand_for_the_same(other, path)
        if other.shape is None or len(other.shape) != len(model.shape):
            raise DataError(
                f"dataset {name!r} has shape {model.shape} in {first!r}, but {other.shape} in {path!r}: ranks differ"
            )
        differing = [place for place, (a, b) in enumerate(zip(model.shape, other.shape)) if a != b]
        if set(differing) - set(self.axes) and not self.filled:
            allowed = " and ".join(map(str, self.axes))
            raise DataError(
                f"dataset {name!r} has shape {model.shape} in {first!r}, but {other.shape} in {path!r}: they may differ along "
                f"axis {allowed} only, or give fill="
            )

    def _stand_for_the_same(self, other: h5py.Dataset, path: str) -> None:
        for key in PACKING:
            ours, theirs = (dataset.attrs.get(key) for dataset in (self.model, other))
            if not _equal(ours, theirs):
                raise DataError(
                    f"dataset {self.name!r} has {key} = {_shown(ours)} in {self.path!r}, but {_shown(theirs)} in {path!r}: the "
                    "numbers of one would mean others in the joined dataset. Join what they stand for: "
                    "h5write(destination, hdf5([…], unpack=True))"
                )

    def _dtype(self) -> np.dtype | None:
        kinds = [dataset.dtype for row in self.cells for dataset in row if dataset is not None]
        if all(kind == kinds[0] for kind in kinds):
            return None
        if any(kind.kind not in "biufc" for kind in kinds):
            listed = ", ".join(sorted({str(kind) for kind in kinds}))
            raise DataError(f"dataset {self.name!r} is {listed} in different sources, which have no dtype in common")
        return np.result_type(*kinds)


def _axis(name: str, path: str, dataset: h5py.Dataset, axis: int) -> int:
    import h5py

    if h5py.check_ref_dtype(dataset.dtype) is not None:
        raise DataError(f"dataset {name!r} in {path!r} holds references, which mean nothing in another file")
    if not dataset.shape:
        raise DataError(f"dataset {name!r} in {path!r} is a scalar: it has no axis to join along (an attribute could hold it)")
    rank = len(dataset.shape)
    if not -rank <= axis < rank:
        raise DataError(
            f"dataset {name!r} in {path!r} has shape {dataset.shape}: axis must lie in {-rank} … {rank - 1}, got {axis}"
        )
    return axis % rank


def _equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    one, other = np.ravel(one), np.ravel(other)
    numbers = one.dtype.kind == other.dtype.kind == "f"
    return np.array_equal(one, other, equal_nan=numbers)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    # A float32 with the digits that it has.
    numbers = np.ravel(value)
    return str(numbers[0]) if len(numbers) == 1 else f"[{', '.join(map(str, numbers))}]"


def _length(dataset: h5py.Dataset, axis: int | None) -> int | None:
    shape = dataset.shape or ()
    return shape[axis] if axis is not None and -len(shape) <= axis < len(shape) else None


__all__ = ["Grid", "Joined", "Part", "joined"]
