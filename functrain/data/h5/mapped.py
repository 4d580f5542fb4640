"""Rows of contiguous datasets, out of a map of the file into memory."""

from __future__ import annotations

import mmap
import os

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import dataset_of, found, intact, opened
from functrain.data.h5.layout import Layout, layout_of


class Map:
    """A whole file in memory, read-only."""

    def __init__(self, path: str) -> None:
        self.path = path
        with intact(repr(path)), open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check(self, end: int, name: str) -> None:
        """Raise `DataError` if the file has become shorter than `end` bytes."""
        # Reading a page past the end of the file kills the process (SIGBUS): ask for its size first, at 0.3 µs.
        size = self.memory.size()
        if size < end:
            raise DataError(f"{self.path!r} shrank to {size} bytes since it was opened; dataset {name!r} needs {end}")


class Mapped:
    """Rows of a contiguous dataset, copied out of the map."""

    run = 1

    def __init__(self, memory: Map, layout: Layout) -> None:
        assert layout.offset is not None
        self._memory, self.layout = memory, layout
        self._end = layout.offset + layout.size
        memory.check(self._end, layout.name)
        # As bytes: a dataset may begin at an odd offset, and np.take would copy an unaligned array whole.
        flat = np.frombuffer(memory.memory, np.uint8, layout.size, layout.offset)
        self._bytes = flat.reshape(layout.shape[0], -1)

    def rows(self, where: slice | np.ndarray) -> np.ndarray:
        self._memory.check(self._end, self.layout.name)
        picked = self._bytes[where].copy() if isinstance(where, slice) else np.take(self._bytes, where, axis=0)
        return picked.view(self.layout.dtype).reshape(-1, *self.layout.shape[1:])

    def announce(self, indices: np.ndarray) -> None:
        """Nothing to do: the system reads ahead."""


def readmmap(path: str | os.PathLike[str], dataset: str) -> np.ndarray:
    """A dataset as a read-only `np.memmap`: nothing is read until it is looked at.

    Raises `DataError` with the reason where it cannot be mapped (chunked, compact, of another byte order …).

    >>> import functrain as ft, numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"x": np.arange(4)})
    >>> ft.readmmap(folder.name + "/a.h5", "x")[2:].tolist()
    [2, 3]
    >>> folder.cleanup()
    """
    path = os.fspath(path)
    with opened(path) as file:
        layout = layout_of(dataset_of(found(file, path, dataset), path, dataset), path, dataset)
    if layout.offset is None:
        raise DataError(f"dataset {layout.name!r} in {path!r} cannot be memory-mapped. It is {layout.reason}; hdf5() does")
    return np.memmap(layout.file, layout.dtype, "r", layout.offset, layout.shape)
