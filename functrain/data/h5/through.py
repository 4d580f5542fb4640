"""Rows of any dataset, read by h5py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import Handle, intact
from functrain.data.h5.layout import Layout

if TYPE_CHECKING:
    import h5py


class Through:
    """Rows of any dataset, read by h5py under its one lock."""

    def __init__(self, file: Handle, layout: Layout) -> None:
        self._file, self.layout = file, layout
        self.run = 1

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        with intact(f"dataset {self.layout.name!r} in {self._file.path!r}"):
            dataset = self._file.here()[self.layout.name]
            if dataset.shape != self.layout.shape or dataset.dtype != self.layout.dtype:
                raise DataError(f"dataset {self.layout.name!r} in {self._file.path!r} changed since it was opened")
            return dataset[where] if isinstance(where, slice) else self._scattered(dataset, where)

    def _scattered(self, dataset: h5py.Dataset, indices: np.ndarray) -> np.ndarray:
        # h5py takes increasing indices only, each once.
        unique, places = np.unique(indices, return_inverse=True)
        first, last = int(unique[0]), int(unique[-1])
        if last - first < 2 * len(unique):
            return dataset[first : last + 1][unique[places] - first]
        return dataset[unique][places]

    def announce(self, indices: np.ndarray) -> None:
        """Nothing to do: h5py reads when it is asked."""
