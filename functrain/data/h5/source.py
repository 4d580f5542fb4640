"""A source over the datasets of an HDF5 file."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core import tree
from functrain.core.errors import ArgumentError, DataError
from functrain.core.tree import Tree
from functrain.data.h5.columns import Column
from functrain.data.h5.files import FAILURES, dataset_of, found, intact, listing, opened
from functrain.data.h5.layout import Layout, layout_of
from functrain.data.h5.readers import Readers
from functrain.data.rows import whole_run
from functrain.data.runs import Runs
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
            self.bare, layouts = _layouts(file, path, group, datasets)
        self.length = _common_length(path, layouts)
        self._shared = Readers(path)
        self._columns = {
            name: Column(self._shared.reader(layout), f"dataset {layout.name!r} in {path!r}")
            for name, layout in layouts.items()
        }
        self._texts = {name: str(column) for name, column in self._columns.items()}
        self._finalizer = weakref.finalize(self, self._shared.close)

    def get(self, i: int, epoch: int) -> Tree:
        return tree.map(lambda leaf: leaf[0], self._rows(slice(i, i + 1)))

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        run = whole_run(indices)
        return self._rows(indices if run is None else run)

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        for column in self._columns.values():
            column.reader.announce(indices)

    def runs(self) -> Runs | None:
        step = max(column.reader.run for column in self._columns.values())
        size = sum(column.reader.layout.size for column in self._columns.values()) // len(self)
        return Runs(((len(self), step),), size) if step > 1 else None

    def _rows(self, where: slice | np.ndarray) -> Tree:
        if not self._finalizer.alive:
            raise DataError(f"the source over {self.path!r} was closed: open it again with hdf5(…)")
        rows = {name: column.rows(where) for name, column in self._columns.items()}
        return rows[""] if self.bare else rows

    def close(self) -> None:
        """Let go of the file; reading from this source, or one made from it, is a `DataError` from now on."""
        self._finalizer()
        self._columns = {}

    def __enter__(self) -> HDF5:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def facts(self) -> dict[str, str]:
        where = {"file": self.path, **({"group": self.group} if self.group else {})}
        return {
            **where,
            **super().facts(),
            **{name or "elements": text for name, text in self._texts.items()},
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
