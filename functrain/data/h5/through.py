"""Rows of any dataset, read by h5py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import Handle, intact
from functrain.data.h5.growing import current
from functrain.data.h5.layout import Layout
from functrain.data.h5.links import in_bytes
from functrain.data.h5.parameters import check_chunk, check_size, lacking

if TYPE_CHECKING:
    import h5py


# HDF5 2.0 goes through all chunks between the first row that is asked for at once and the last, written or not: about
# 30 ns each (one run), so that so many take longer than a read of one more row.
_FAR = 1 << 12


class Through:
    """Rows of any dataset, or chunks of a chunked one, read by h5py under its one lock."""

    run = 1

    def __init__(self, file: Handle, layout: Layout) -> None:
        self._file, self.layout = file, layout
        self._before = (slice(None),) * layout.axis

    def _dataset(self) -> h5py.Dataset:
        layout = self.layout
        dataset = current(self._file.here()[in_bytes(layout.name)], layout.length, layout.axis)
        shape = list(dataset.shape)
        if self._file.swmr:
            shape[layout.axis] = min(shape[layout.axis], layout.length)
        if tuple(shape) != layout.shape or dataset.dtype != layout.dtype:
            raise DataError(f"dataset {self.layout.name!r} in {self._file.path!r} changed since it was opened")
        check_size(dataset)
        return dataset

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        with intact(f"dataset {self.layout.name!r} in {self._file.path!r}"):
            dataset = self._dataset()
            with self._told():
                rows = dataset[(*self._before, where)] if isinstance(where, slice) else self._scattered(dataset, where)
        return np.moveaxis(rows, self.layout.axis, 0)

    def _scattered(self, dataset: h5py.Dataset, indices: np.ndarray) -> np.ndarray:
        # h5py takes increasing indices only, each once.
        unique, places = np.unique(indices, return_inverse=True)
        first, last = int(unique[0]), int(unique[-1])
        if dataset.chunks and last - first > _FAR * len(unique) * dataset.chunks[self.layout.axis]:
            rows = np.concatenate([dataset[(*self._before, slice(row, row + 1))] for row in unique.tolist()], self.layout.axis)
            return np.take(rows, places, self.layout.axis)
        if last - first < 2 * len(unique):
            return dataset[(*self._before, slice(first, last + 1))][(*self._before, unique[places] - first)]
        return dataset[(*self._before, unique)][(*self._before, places)]

    def chunk(self, number: int, out: np.ndarray) -> None:
        """The bytes of a chunk; of one at the edge, what lies within the shape."""
        index, pipeline = self.layout.index, self.layout.pipeline
        assert index is not None
        assert pipeline is not None
        with intact(f"dataset {self.layout.name!r} in {self._file.path!r}, chunk {index.coordinates(number)}"):
            dataset, region = self._dataset(), index.region(number)
            check_chunk(dataset, index, pipeline, number)
            with self._told():
                data = dataset[region]
            valid = tuple(slice(0, part.stop - part.start) for part in region)
            out.reshape(*index.chunks, index.itemsize)[valid] = data.view((np.uint8, (index.itemsize,)))

    def stored(self, number: int, start: int, out: np.ndarray) -> bool:
        """Never: h5py reads whole chunks."""
        return False

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Says which filter h5py lacks, where one is why it cannot read."""
        try:
            yield
        except OSError as error:
            missing = lacking(self.layout.pipeline) if self.layout.pipeline else None
            if not missing:
                raise
            where = f"dataset {self.layout.name!r} in {self._file.path!r}"
            raise DataError(f"{where} cannot be read: h5py lacks the filter {missing}") from error

    def announce(self, indices: np.ndarray) -> None:
        """Nothing to do: h5py reads when it is asked."""
