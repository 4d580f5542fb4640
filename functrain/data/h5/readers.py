"""The reader that suits a dataset."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from functrain.data.h5.files import Handle
from functrain.data.h5.layout import Layout
from functrain.data.h5.mapped import Map, Mapped
from functrain.data.h5.through import Through


class Reader(Protocol):
    """Rows of one dataset along its sample axis, in the dtype and byte order of the file.

    - `layout`: the dataset.
    - `run`: how many neighbouring rows are read, and decoded, together (the rows of a chunk; 1 where each lies alone).
    """

    layout: Layout
    run: int

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        """The rows at `where` (a slice, or int64 indices in any order) as `(K, …)`, in memory of their own."""
        ...

    def announce(self, indices: np.ndarray) -> None:
        """These rows will be read soon: begin with what can be done ahead. Never waits."""
        ...


class Readers:
    """The readers of one file's datasets, with what they share: the map of the file, the handle of each process."""

    def __init__(self, path: str) -> None:
        self.handle = Handle(path)
        self._maps: dict[str, Map] = {}

    def reader(self, layout: Layout) -> Reader:
        """The reader for a dataset."""
        if layout.offset is None:
            return Through(self.handle, layout)
        if layout.file not in self._maps:
            self._maps[layout.file] = Map(layout.file)
        return Mapped(self._maps[layout.file], layout)

    def close(self) -> None:
        """Let go of the file."""
        self.handle.close()
