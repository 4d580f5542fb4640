"""The reader that suits a dataset."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from functrain.data.budget import Budget
from functrain.data.h5.chunked import Chunked, Direct, differing
from functrain.data.h5.edges import Doubtful, unfiltered
from functrain.data.h5.files import Handle
from functrain.data.h5.growing import Growing, Load
from functrain.data.h5.layout import Layout
from functrain.data.h5.mapped import Mapped
from functrain.data.h5.pool import Pool
from functrain.data.h5.raw import Bytes, LocalBytes
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
    """The readers of one file's datasets, with what they share.

    That is the bytes and the map of the file, the handle of each process, the budget of bytes, `threads` that decode.
    """

    def __init__(
        self,
        path: str,
        *,
        threads: int = 1,
        memory: int | str | Budget = "512 MiB",
        pool: Pool | None = None,
        swmr: bool = False,
        storage: Mapping[str, Any] | None = None,
    ) -> None:
        self.handle, self.budget = Handle(path, swmr=swmr, storage=storage), Budget.of(memory)
        self.pool = Pool(threads) if pool is None else pool
        self._own_pool = pool is None
        self._files: dict[str, LocalBytes] = {}

    def reader(self, layout: Layout) -> Reader:
        """The reader for a dataset."""
        through = Through(self.handle, layout)
        index, pipeline = layout.index, layout.pipeline
        if layout.way == "mmap" and index is None:
            return Mapped(layout, self._local(layout.file), self.budget)
        if index is None or pipeline is None:
            return through
        if layout.way == "h5py":
            return Chunked(layout, index, through, self.budget, self.pool)
        direct = Direct(layout, index, pipeline, self._file(layout.file), through)
        edges = None if pipeline.plain or self.handle.swmr else index.unfiltered_edges()
        doubtful = edges is not None and pipeline.reorders
        if edges is not None and not doubtful:
            bare = Direct(layout, edges, pipeline, self._file(layout.file), through)
            if unfiltered(edges, bare, through):
                index, direct = edges, bare
        difference = differing(index, direct, through, edges=not doubtful)
        if difference is not None:
            reason = f"read through h5py, as direct decoding went wrong ({difference})"
            warnings.warn(f"dataset {layout.name!r} in {layout.file!r} is {reason}", RuntimeWarning, stacklevel=4)
            return Chunked(layout.by_h5py(reason), index, through, self.budget, self.pool)
        if layout.way == "mmap":
            return Mapped(layout, self._local(layout.file), self.budget)
        load: Load = Growing(index, direct, through) if self.handle.swmr else direct
        return Chunked(layout, index, Doubtful(index, direct, through) if doubtful else load, self.budget, self.pool)

    def _file(self, path: str) -> Bytes:
        return self.handle.raw() if self.handle.remote else self._local(path)

    def _local(self, path: str) -> LocalBytes:
        if path not in self._files:
            self._files[path] = LocalBytes(path)
        return self._files[path]

    def close(self) -> None:
        """Let go of the file, end the threads that are its own."""
        if self._own_pool:
            self.pool.close()
        self.handle.close()
        for file in self._files.values():
            file.close()
