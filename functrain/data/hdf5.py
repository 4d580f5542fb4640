"""A source over the datasets of an HDF5 file, memory-mapped where their layout allows it."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from functrain.core.errors import ArgumentError, DataError
from functrain.core.tree import Tree
from functrain.data.layout import FAILURES, Layout, dataset_of, found, intact, layout_of, listing, open_file, opened
from functrain.data.rows import tensor, whole_run
from functrain.data.source import Source

if TYPE_CHECKING:
    import h5py


def hdf5(path: str | os.PathLike[str], group: str | None = None, *, datasets: Sequence[str] | None = None) -> HDF5:
    """A source over the datasets `(N, …)` of an HDF5 file: element i is `{name: row i}`.

    - `group`: where the datasets lie; default the root. If it names a dataset, elements are its bare rows.
    - `datasets`: which of them; default all that lie directly in the group.

    Contiguous datasets are memory-mapped (random rows at the speed of memory), all others are read through h5py;
    `explain` says which and why. Numbers come in native byte order. The file is opened again in each process
    that reads; `close`, or a `with` block, lets go of it.

    Raises `DataError`, which names file and dataset: not there, not HDF5, truncated (also when the file shrinks
    later), of a dtype that torch has not (strings, compound …), without samples, or of unequal lengths.

    >>> import functrain as ft, numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"train": {"x": np.zeros((10, 3), "f4"), "y": np.arange(10)}})
    >>> with ft.hdf5(folder.name + "/a.h5", group="train") as source:
    ...     source(3)
    {'x': tensor([0., 0., 0.]), 'y': tensor(3)}
    >>> folder.cleanup()
    """
    if isinstance(datasets, str):
        raise ArgumentError(f"datasets takes a list of names: datasets=[{datasets!r}], or group={datasets!r} for bare rows")
    if group is not None and not isinstance(group, str):
        raise ArgumentError(f"group takes the name of a group or dataset, got {group!r}")
    if datasets is not None and not (isinstance(datasets, Sequence) and all(isinstance(name, str) for name in datasets)):
        raise ArgumentError(f"datasets takes a list of names, got {datasets!r}")
    return HDF5(os.fspath(path), group, datasets)


class HDF5(Source):
    """Rows of datasets in one file."""

    def __init__(self, path: str, group: str | None, datasets: Sequence[str] | None) -> None:
        self.path, self.group = path, group
        with opened(path) as file:
            self.bare, self.layouts = _layouts(file, path, group, datasets)
            maps = _maps(self.layouts)
        self.length = _common_length(path, self.layouts)
        self._file = _File(path)
        self._readers = _readers(self._file, self.layouts, maps)
        self._finalizer = weakref.finalize(self, self._file.close)

    def get(self, i: int, epoch: int) -> Tree:
        rows = {name: reader.rows(slice(i, i + 1))[0] for name, reader in self._open().items()}
        return rows[""] if self.bare else rows

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        run = whole_run(indices)
        rows = {name: reader.rows(indices if run is None else run) for name, reader in self._open().items()}
        return rows[""] if self.bare else rows

    def _open(self) -> dict[str, _Mapped | _Through]:
        if not self._finalizer.alive:
            raise DataError(f"the source over {self.path!r} was closed: open it again with hdf5(…)")
        return self._readers

    def close(self) -> None:
        """Let go of the file; reading from this source, or one made from it, is a `DataError` from now on."""
        self._finalizer()
        self._readers = {}

    def __enter__(self) -> HDF5:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def facts(self) -> dict[str, str]:
        where = {"file": self.path, **({"group": self.group} if self.group else {})}
        return {
            **where,
            **super().facts(),
            **{name or "elements": str(layout) for name, layout in self.layouts.items()},
        }


def _layouts(file: h5py.File, path: str, group: str | None, datasets: Sequence[str] | None) -> tuple[bool, dict[str, Layout]]:
    import h5py

    base = found(file, path, group)
    if isinstance(base, h5py.Dataset):
        if datasets is not None:
            raise ArgumentError(f"{group!r} is a dataset: give its group, or leave datasets= out")
        return True, {"": layout_of(base, path, group or "")}
    # Names as they are sought, not as the items call themselves: behind a link, that is a place in another file.
    prefix = (group or "").strip("/")
    where = f"{group or '/'!r} in {path!r}"
    with intact(where):
        if datasets is None:
            chosen: dict[str, Any] = _members(base, path, prefix)
            if not chosen:
                raise DataError(f"{where} holds no datasets, but {listing(base)}: name a group with group=…")
        else:
            chosen = {name: found(file, path, f"{prefix}/{name}") for name in datasets}
            if not chosen:
                raise ArgumentError("datasets is empty: name at least one, or leave it out to read all")
    items = {name: dataset_of(item, path, name) for name, item in chosen.items()}
    return False, {name: layout_of(dataset, path, f"{prefix}/{name}") for name, dataset in items.items()}


def _members(base: h5py.Group | h5py.Datatype, path: str, prefix: str) -> dict[str, h5py.Dataset]:
    """The datasets that lie directly in a group; what cannot be opened might be one, and is an error."""
    import h5py

    members = {}
    for name in base if isinstance(base, h5py.Group) else ():
        try:
            item = base[name]
        except FAILURES as error:
            where = f"{prefix}/{name}".lstrip("/")
            raise DataError(f"{where!r} in {path!r} cannot be opened ({error}): choose others with datasets=[…]") from error
        if isinstance(item, h5py.Dataset):
            members[name] = item
    return members


def _common_length(path: str, layouts: dict[str, Layout]) -> int:
    lengths = {layout.name: layout.shape[0] for layout in layouts.values()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r}: {length}" for name, length in lengths.items())
        raise DataError(f"the datasets in {path!r} differ in length ({listed}): choose with datasets=[…]")
    return next(iter(lengths.values()))


def _maps(layouts: dict[str, Layout]) -> dict[str, _Map]:
    return {path: _Map(path) for path in {layout.file for layout in layouts.values() if layout.offset is not None}}


def _readers(file: _File, layouts: dict[str, Layout], maps: dict[str, _Map]) -> dict[str, _Mapped | _Through]:
    return {
        name: _Through(file, layout) if layout.offset is None else _Mapped(maps[layout.file], layout)
        for name, layout in layouts.items()
    }


# --- memory-mapped ---------------------------------------------------------------------------------------------


class _Map:
    """A whole file in memory, read-only."""

    def __init__(self, path: str) -> None:
        self.path = path
        with intact(repr(path)), open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check(self, end: int, name: str) -> None:
        # Reading a page past the end of the file kills the process (SIGBUS): ask for its size first, at 0.3 µs.
        size = self.memory.size()
        if size < end:
            raise DataError(f"{self.path!r} shrank to {size} bytes since it was opened; dataset {name!r} needs {end}")


class _Mapped:
    """Rows of a contiguous dataset, copied out of the map."""

    def __init__(self, memory: _Map, layout: Layout) -> None:
        assert layout.offset is not None
        self._memory, self._layout = memory, layout
        self._end = layout.offset + layout.size
        memory.check(self._end, layout.name)
        # As bytes: a dataset may begin at an odd offset, and np.take would copy an unaligned array whole.
        flat = np.frombuffer(memory.memory, np.uint8, layout.size, layout.offset)
        self._bytes = flat.reshape(layout.shape[0], -1)

    def rows(self, where: slice | np.ndarray) -> Tensor:
        self._memory.check(self._end, self._layout.name)
        picked = self._bytes[where].copy() if isinstance(where, slice) else np.take(self._bytes, where, axis=0)
        return tensor(picked.view(self._layout.dtype).reshape(-1, *self._layout.shape[1:]))


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


# --- through h5py ----------------------------------------------------------------------------------------------


class _File:
    """The h5py handle of each process: one made before a fork must not be used after it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._handles: dict[int, Any] = {}

    def here(self) -> h5py.File:
        pid = os.getpid()
        handle = self._handles.get(pid)
        if handle is None:
            # Two threads may both open it: the first to come stays, without a lock that a fork could leave held.
            mine = open_file(self.path)
            handle = self._handles.setdefault(pid, mine)
            if handle is not mine:
                mine.close()
        return handle

    def close(self) -> None:
        handle = self._handles.pop(os.getpid(), None)
        if handle is not None:
            handle.close()


class _Through:
    """Rows of any dataset, read by h5py."""

    def __init__(self, file: _File, layout: Layout) -> None:
        self._file, self._layout = file, layout

    def rows(self, where: slice | np.ndarray) -> Tensor:
        with intact(f"dataset {self._layout.name!r} in {self._file.path!r}"):
            dataset = self._file.here()[self._layout.name]
            if dataset.shape != self._layout.shape or dataset.dtype != self._layout.dtype:
                raise DataError(f"dataset {self._layout.name!r} in {self._file.path!r} changed since it was opened")
            return tensor(dataset[where] if isinstance(where, slice) else self._scattered(dataset, where))

    def _scattered(self, dataset: h5py.Dataset, indices: np.ndarray) -> np.ndarray:
        # h5py takes increasing indices only, each once.
        unique, places = np.unique(indices, return_inverse=True)
        first, last = int(unique[0]), int(unique[-1])
        if last - first < 2 * len(unique):
            return dataset[first : last + 1][unique[places] - first]
        return dataset[unique][places]
