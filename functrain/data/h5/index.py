"""Where the chunks of a dataset lie in its file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.header import EXTENSIBLE_ARRAY, index_kind

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class ChunkIndex:
    """The chunks of a dataset by number, counted in C order over the grid of chunks; 16 bytes for each.

    `offset` int64 is −1 where a chunk was never written (all fill value); `mask` tells which filters were skipped.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    itemsize: int
    offset: np.ndarray = field(repr=False)
    size: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        return grid_of(self.shape, self.chunks)

    @property
    def bytes(self) -> int:
        """The size of a decoded chunk: those at the edge are stored whole too."""
        return math.prod(self.chunks) * self.itemsize

    def coordinates(self, number: int) -> tuple[int, ...]:
        """The place in the grid of a chunk."""
        return tuple(int(place) for place in np.unravel_index(number, self.grid))

    def region(self, number: int) -> tuple[slice, ...]:
        """The part of the dataset that a chunk holds."""
        starts = [place * chunk for place, chunk in zip(self.coordinates(number), self.chunks)]
        return tuple(slice(start, min(start + c, size)) for start, c, size in zip(starts, self.chunks, self.shape))

    @property
    def edges(self) -> np.ndarray:
        """Which chunks reach beyond the shape, bool."""
        beyond = np.zeros(self.grid, np.bool_)
        for axis, (size, chunk) in enumerate(zip(self.shape, self.chunks)):
            if size % chunk:
                beyond[(slice(None),) * axis + (-1,)] = True
        return beyond.reshape(-1)

    def unfiltered_edges(self) -> ChunkIndex | None:
        """The same chunks, if those at the edge were stored without filters; None where their sizes say otherwise.

        HDF5 can be told to leave them so, marks none of them, and h5py cannot tell.
        """
        edges = self.edges & (self.offset >= 0)
        if not edges.any() or self.mask[edges].any() or (self.size[edges] != self.bytes).any():
            return None
        return replace(self, mask=np.where(edges, np.uint32(0xFFFFFFFF), self.mask))

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> ChunkIndex:
        """The index of a chunked dataset, in one pass over it; `DataError` for one that is damaged.

        HDF5 looks a chunk up by number in a time that grows with the number, so it is asked for all at once
        (0.8 µs a chunk).
        """
        shape, chunks, itemsize = dataset.shape, dataset.chunks, dataset.dtype.itemsize
        grid = grid_of(shape, chunks)
        where = f"dataset {dataset.name!r} in {dataset.file.filename!r}"
        number = math.prod(grid)
        wrong = misplaced(dataset)
        if wrong is not None:
            raise DataError(f"{where} has no index that can be used: {wrong}")
        if number > _MOST:
            raise DataError(f"{where} has a grid of {number:,} chunks of {chunks}, more than an index can hold: is it damaged?")
        found: list[tuple[tuple[int, ...], int, int, int]] = []

        def note(chunk: h5py.h5d.StoreInfo) -> None:
            found.append((chunk.chunk_offset, chunk.byte_offset, chunk.size, chunk.filter_mask))

        dataset.id.chunk_iter(note)
        offset, size, mask = np.full(number, -1, np.int64), np.zeros(number, np.uint32), np.zeros(number, np.uint32)
        if found:
            _place(where, found, grid, chunks, offset, size, mask)
        return cls(shape, chunks, itemsize, offset, size, mask)


def misplaced(dataset: h5py.Dataset) -> str | None:
    """Why HDF5 is not to be asked where the chunks of a dataset lie, as it names wrong ones; None where it may be.

    HDF5 2.0 stores the chunks along the one axis that may grow without end as if that axis came first (extensible array), and
    lists them as if it did not: chunks trade places, or seem to lie outside of the shape. Reading goes right.
    """
    endless = [axis for axis, most in enumerate(dataset.maxshape) if most is None]
    if len(endless) != 1 or math.prod(grid_of(dataset.maxshape[: endless[0]], dataset.chunks[: endless[0]])) <= 1:
        return None
    if index_kind(dataset) not in (None, EXTENSIBLE_ARRAY):
        return None
    return f"HDF5 misplaces chunks where only axis {endless[0]} is unlimited"


def sparse(dataset: h5py.Dataset) -> str | None:
    """Why the chunks of a dataset are not listed: hardly any of very many was ever written; None where they may be.

    An index has 16 bytes for each chunk, there or not: a grid of 2²⁸ took 17 s and 4.5 GB to open.
    """
    number = math.prod(grid_of(dataset.shape, dataset.chunks))
    if number < 1 << 24:
        return None
    there = dataset.id.get_num_chunks()
    return f"{there:,} of {number:,} chunks were ever written" if there < number >> 6 else None


# 2³¹ chunks have an index of 32 GiB: a shape that asks for more was not meant.
_MOST = 1 << 31


def _place(
    where: str,
    found: list[tuple[tuple[int, ...], int, int, int]],
    grid: tuple[int, ...],
    chunks: tuple[int, ...],
    offset: np.ndarray,
    size: np.ndarray,
    mask: np.ndarray,
) -> None:
    origins = np.array([origin for origin, _, _, _ in found], np.int64)
    places, rest = np.divmod(origins, np.array(chunks, np.int64))
    # Chunks outside the shape are left from before it shrank.
    inside = ((places >= 0) & (places < np.array(grid, np.int64))).all(axis=1)
    if rest.any():
        raise DataError(f"{where} is damaged: its index names a chunk that begins at {tuple(origins[rest.any(axis=1)][0])}")
    numbers = np.ravel_multi_index(tuple(places[inside].T), grid)
    if len(np.unique(numbers)) != len(numbers):
        raise DataError(f"{where} is damaged: its index names a chunk twice")
    described = [np.array([entry[place] for entry in found], np.int64)[inside] for place in (1, 2, 3)]
    offset[numbers], size[numbers], mask[numbers] = described
    if (described[0] < 0).any() or (described[1] < 0).any():
        raise DataError(f"{where} is damaged: its index names a chunk before the beginning of the file")


def grid_of(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """The number of chunks along each axis.

    >>> grid_of((10, 3), (4, 3))
    (3, 1)
    """
    return tuple(-(-size // chunk) for size, chunk in zip(shape, chunks))
