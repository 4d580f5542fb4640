"""A look at an HDF5 file before training from it: what it holds, how it lies there, how fast it can be read."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.columns import Column, kind
from functrain.data.h5.concerns import concerns
from functrain.data.h5.contents import Entry, contents
from functrain.data.h5.files import FAILURES, intact, opened
from functrain.data.h5.filters import Pipeline
from functrain.data.h5.hashes import Hasher
from functrain.data.h5.layout import layout_of
from functrain.data.h5.packed import PACKING, is_packed
from functrain.data.h5.plausible import plausible
from functrain.data.h5.raw import is_url
from functrain.data.h5.readers import Reader, Readers
from functrain.data.h5.report import DatasetReport, GroupReport, Report

if TYPE_CHECKING:
    import h5py

T = TypeVar("T")

# What is read of each dataset, at most, to measure how fast that goes.
_SAMPLE, _SECONDS = 32 << 20, 0.5
# In all, where there are many datasets.
_TOGETHER = 20.0
# Less is read in no time, whatever the way.
_LEAST = 1 << 20
# Files up to this size are hashed unasked.
_SMALL = 64 << 20
# Attributes that say how to read a dataset or group.
_TELLING = (
    *PACKING,
    *("units", "long_name", "encoding-type", "shape"),
)


def h5inspect(
    path: str | os.PathLike[str],
    group: str | None = None,
    *,
    speed: bool = True,
    hashes: bool | None = None,
    root: str | os.PathLike[str] | None = None,
    storage: Mapping[str, Any] | None = None,
) -> Report:
    """What an HDF5 file, or a group of it, holds, and what is to be known before training from it.

    - `speed`: measure how fast each dataset is read, by what `hdf5` would read it with, in order, on one thread: at most
      32 MiB and about half a second of each, and 20 seconds of all. What the system has in memory already is read faster
      than from disk.
    - `hashes`: add those of `content_hash`; by default for files of at most 64 MiB.
    - `root`, `storage`: as `hdf5` has them.

    What is wrong with one dataset is in its report's warnings and lets the others be. Raises `DataError` for a file that
    cannot be opened, and a group that is not there. `print` shows it as a table.

    >>> import functrain as ft, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"train": {"x": np.zeros((1000, 8), "f4")}}, compression="gzip")
    >>> report = ft.h5inspect(folder.name + "/a.h5")
    >>> [(each.name, each.shape, each.dtype, each.filters, each.way) for each in report.datasets]
    [('train/x', (1000, 8), 'float32', 'gzip', 'direct')]
    >>> folder.cleanup()
    """
    path = os.fspath(path)
    with opened(path, storage=storage) as file, intact(repr(path)):
        size = file.id.get_filesize()
        entries = list(contents(file, path, group, None if root is None else os.fspath(root)))
        look = _Look(path, speed, size <= _SMALL if hashes is None else hashes, storage)
        try:
            return look.report(file, size, group, entries)
        finally:
            look.close()


class _Look:
    """The readers of one file, while it is looked at."""

    def __init__(self, path: str, speed: bool, hashes: bool, storage: Mapping[str, Any] | None) -> None:
        self._path, self._left = path, _TOGETHER if speed else 0.0
        self._readers = Readers(path, memory=2 * _SAMPLE, storage=storage)
        self._hasher = Hasher(path, storage) if hashes else None

    def close(self) -> None:
        self._readers.close()
        if self._hasher is not None:
            self._hasher.close()

    def report(self, file: h5py.File, size: int, group: str | None, entries: list[Entry]) -> Report:
        import h5py

        datasets = tuple(self._dataset(entry) for entry in entries if isinstance(entry.item, h5py.Dataset))
        groups = [entry for entry in entries if isinstance(entry.item, h5py.Group)]
        base = file["/"] if not (group or "").strip("/") else file[str(group)]
        if isinstance(base, h5py.Group):
            groups.insert(0, Entry((group or "").strip("/"), base))
        below: dict[str, list[Entry]] = {}
        for entry in entries:
            below.setdefault(entry.name.rpartition("/")[0], []).append(entry)
        broken = tuple((entry.name, str(entry.error)) for entry in entries if entry.error is not None)
        return Report(self._path, size, tuple(_group(each, below.get(each.name, [])) for each in groups), datasets, broken)

    def _dataset(self, entry: Entry) -> DatasetReport:
        dataset = entry.item
        complaints: list[str] = []
        sound = self._tried(entry.name, complaints, lambda: _looked_over(dataset))
        complaints += sound or ()
        reader = speed = hash_ = None
        if sound is not None and dataset.shape:
            reader = self._tried(entry.name, complaints, lambda: self._reader(dataset, entry.name))
        if reader is not None:
            layout = reader.layout
            self._tried(entry.name, complaints, lambda: Column(layout, f"dataset {entry.name!r} in {self._path!r}"))
            speed = self._tried(entry.name, complaints, lambda: self._measured(reader)) if self._left > 0 else None
        if sound is not None and self._hasher is not None:
            hasher = self._hasher
            hash_ = self._tried(entry.name, complaints, lambda: hasher.of(dataset, entry.name))
        return DatasetReport(
            entry.name,
            dataset.shape,
            kind(dataset.dtype),
            *_stored(dataset),
            reader.layout.way if reader is not None else "",
            reader.layout.reason if reader is not None else "",
            speed,
            _attributes(dataset),
            self._tried(entry.name, complaints, lambda: is_packed(dataset)) or False,
            entry.link,
            tuple(dict.fromkeys(complaints)),
            hash_,
        )

    def _tried(self, name: str, complaints: list[str], ask: Callable[[], T]) -> T | None:
        """What `ask` gives; None, and one complaint more, where it raises."""
        where = f"dataset {name!r} in {self._path!r}"
        try:
            with intact(where):
                return ask()
        except DataError as error:
            complaints.append(str(error).removeprefix(f"{where} "))
            return None

    def _reader(self, dataset: h5py.Dataset, name: str) -> Reader:
        with warnings.catch_warnings():
            # It is in the reason too.
            warnings.simplefilter("ignore", RuntimeWarning)
            return self._readers.reader(layout_of(dataset, self._path, name, 0, not is_url(self._path)))

    def _measured(self, reader: Reader) -> float | None:
        """Bytes a second, from the beginning on; None for datasets that are too small to tell."""
        layout = reader.layout
        row = layout.size // layout.length
        if layout.size < _LEAST or layout.dtype.hasobject or row > _SAMPLE:
            return None
        step = max(1, _SAMPLE // 8 // row)
        step = max(reader.run, step - step % reader.run)
        start = ended = time.perf_counter()
        done = 0
        while done < layout.length and done * row < _SAMPLE and ended - start < _SECONDS:
            done += len(reader.rows(slice(done, min(done + step, layout.length))))
            ended = time.perf_counter()
        self._left -= ended - start
        return done * row / max(ended - start, 1e-9)


# --- one dataset ---------------------------------------------------------------------------------------------


def _stored(dataset: h5py.Dataset) -> tuple[str, str, int, int]:
    """The layout and filters in words, the size of all elements, and what is stored of them."""
    import h5py

    plist = dataset.id.get_create_plist()
    size = math.prod(dataset.shape or ()) * dataset.dtype.itemsize if dataset.shape is not None else 0
    stored = dataset.id.get_storage_size()
    if dataset.chunks is not None:
        filters = str(Pipeline.of(dataset))
        return f"chunks {'×'.join(map(str, dataset.chunks))}", "" if filters == "no filter" else filters, size, stored
    if dataset.is_virtual:
        return f"virtual, {len(dataset.virtual_sources())} parts", "", size, stored
    if plist.get_external_count():
        return "external", "", size, stored
    return ("compact" if plist.get_layout() == h5py.h5d.COMPACT else "contiguous"), "", size, stored


def _looked_over(dataset: h5py.Dataset) -> list[str]:
    plausible(dataset)
    return list(concerns(dataset))


def _attributes(item: Any) -> dict[str, str]:
    """The attributes that say how to read it, in words; those too long to be read at a glance are left out."""
    told = {}
    for name in _TELLING:
        try:
            if name in item.attrs and item.attrs.get_id(name).get_storage_size() <= 1 << 10:
                value = item.attrs[name]
                told[name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else _short(value)
        except FAILURES as error:
            told[name] = f"cannot be read ({error})"
    return told


def _short(value: Any) -> str:
    array = np.asarray(value)
    return str(array.item()) if array.size == 1 else str(array.tolist())


# --- one group -----------------------------------------------------------------------------------------------


def _group(entry: Entry, below: list[Entry]) -> GroupReport:
    import h5py

    direct = below if entry.link is None else []
    datasets = [other for other in direct if isinstance(other.item, h5py.Dataset)]
    lengths = {other.name.rpartition("/")[2]: other.item.shape[0] for other in datasets if other.item.shape}
    told = []
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in list(lengths.items())[:5])
        listed += " …" if len(lengths) > 5 else ""
        told.append(f"its datasets differ in length ({listed}): choose with datasets=[…]")
    groups = sum(isinstance(other.item, h5py.Group) for other in direct)
    return GroupReport(entry.name, len(datasets), groups, _attributes(entry.item), entry.link, tuple(told))


__all__ = ["DatasetReport", "GroupReport", "Report", "h5inspect"]
