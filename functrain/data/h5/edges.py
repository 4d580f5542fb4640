"""Chunks at the edge of a dataset that may have been stored without filters, which HDF5 does on request and does not tell."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.chunked import Direct, compared
from functrain.data.h5.codecs import ShortError
from functrain.data.h5.index import ChunkIndex
from functrain.data.h5.through import Through


def unfiltered(index: ChunkIndex, direct: Direct, through: Through) -> bool:
    """Whether a chunk at the edge, read without undoing filters, is what h5py reads: then none of them is filtered."""
    number = int(np.flatnonzero(index.edges & (index.offset >= 0))[0])
    with suppress(DataError, ShortError):
        return compared(index, direct, through, number) is None
    return False


class Doubtful:
    """Chunks whose filters only reorder bytes: no size tells whether one at the edge was left as it is, so h5py decides."""

    def __init__(self, index: ChunkIndex, direct: Direct, through: Through) -> None:
        self._edges, self._direct, self._through = index.edges, direct, through

    def chunk(self, number: int, out: np.ndarray) -> None:
        """The bytes of a chunk; of one at the edge, what lies within the shape."""
        if self._edges[number]:
            # An h5py that lacks the filter reads a chunk that was left as it is, and no other.
            with suppress(DataError):
                return self._through.chunk(number, out)
        return self._direct.chunk(number, out)

    def stored(self, number: int, start: int, out: np.ndarray) -> bool:
        """Of a chunk at the edge that is not to be known."""
        return not self._edges[number] and self._direct.stored(number, start, out)
