"""HDF5 files that another process appends to, in HDF5's SWMR mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from functrain.data.h5.index import ChunkIndex

if TYPE_CHECKING:
    import h5py


def current(dataset: h5py.Dataset, least: int = 0, axis: int = 0) -> h5py.Dataset:
    """The dataset as its writer last flushed it, if it is shorter than `least` so far (0: in any case)."""
    # HDF5 shares what it knows of a file among all that have it open in a process: a new handle sees old lengths too.
    if dataset.file.swmr_mode and (not least or dataset.shape[axis] < least):
        dataset.id.refresh()
    return dataset


class Load(Protocol):
    """Whatever brings the bytes of a chunk."""

    def chunk(self, number: int, out: np.ndarray) -> None:
        """The bytes of a chunk."""
        ...

    def stored(self, number: int, start: int, out: np.ndarray) -> bool:
        """Bytes of a chunk from `start` on, if they can be had without the others; whether they can."""
        ...


class Growing:
    """Chunks of a dataset that grows: those that were whole when its length was pinned come directly, others through h5py.

    A chunk that is filled up further is written again, elsewhere or in its place, and one that is not there yet may come.
    """

    def __init__(self, index: ChunkIndex, direct: Load, through: Load) -> None:
        self._index, self._direct, self._through = index, direct, through

    def chunk(self, number: int, out: np.ndarray) -> None:
        """The bytes of a chunk; of one at the edge, what lies within the shape."""
        index = self._index
        whole = all(part.stop - part.start == size for part, size in zip(index.region(number), index.chunks))
        load = self._direct if whole and index.offset[number] >= 0 else self._through
        load.chunk(number, out)

    def stored(self, number: int, start: int, out: np.ndarray) -> bool:
        """Never: a chunk may be written elsewhere meanwhile."""
        return False
