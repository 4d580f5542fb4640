"""How the files of a source are opened and read: threads, memory, and what may be followed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from functrain.core.errors import ArgumentError
from functrain.data.arguments import integer
from functrain.data.budget import Budget
from functrain.data.h5.files import opened
from functrain.data.h5.pool import Pool
from functrain.data.h5.raw import is_url
from functrain.data.h5.readers import Readers

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class Access:
    """The arguments of `hdf5` that say how its files are read, checked; files of one source share the budget."""

    threads: int
    memory: Budget
    swmr: bool
    root: str | None
    storage: dict[str, Any] | None

    @classmethod
    def of(cls, threads: Any, memory: Any, swmr: Any = False, root: Any = None, storage: Any = None) -> Access:
        """The arguments as they were given; `ArgumentError` for those that mean nothing."""
        if not isinstance(swmr, bool):
            raise ArgumentError(f"swmr takes True or False, got {swmr!r}")
        if root is not None and not isinstance(root, (str, os.PathLike)):
            raise ArgumentError(f"root takes the path of a folder, got {root!r}")
        if storage is not None and not (isinstance(storage, Mapping) and all(isinstance(key, str) for key in storage)):
            raise ArgumentError(f"storage takes the options of a file system by name, {{…}}, got {storage!r}")
        limit = None if root is None else os.fspath(root)
        options = None if storage is None else dict(storage)
        return cls(integer("threads", threads, 1), Budget.of(memory), swmr, limit, options)

    def mappable(self, path: str) -> bool:
        """Whether the bytes of a file may be used where they lie: it is on this machine, and nobody writes to it."""
        return not self.swmr and not is_url(path)

    def opened(self, path: str) -> AbstractContextManager[h5py.File]:
        """The file at `path`, open for a look at what it holds."""
        return opened(path, swmr=self.swmr, storage=self.storage)

    def readers(self, path: str, pool: Pool) -> Readers:
        """What reads the datasets of the file at `path`, in threads of the pool."""
        return Readers(path, memory=self.memory, pool=pool, swmr=self.swmr, storage=self.storage)
