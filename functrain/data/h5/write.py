"""Writing arrays, or batches as they come, to an HDF5 file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.data.budget import size_of
from functrain.data.h5.appending import Appended, fill
from functrain.data.h5.batches import begun, is_stream, named_arrays, prefix_of, stream
from functrain.data.h5.chunking import Storage
from functrain.data.h5.output import Output, replacing
from functrain.data.source import integer


def h5write(
    path: str | os.PathLike[str],
    data: Any,
    *,
    group: str | None = None,
    overwrite: bool = False,
    layout: str | None = None,
    chunks: int | tuple[int, ...] | None = None,
    compression: Any = None,
    shuffle: bool = False,
    checksum: bool = False,
    length: int | None = None,
    memory: int | str = "64 MiB",
    progress: Callable[[int, int | None], object] | None = None,
) -> None:
    """Write a tree of arrays, a source, or batches as they come, to a new HDF5 file: dicts become groups, leaves datasets.

    - `data`: arrays or tensors; a `Source`, whose element i becomes row i; or anything that gives batches (trees of arrays
      `(N, …)`): a list, a generator, a DataLoader. Places in a tuple are names: "0", "1". The elements of `source.batch(8)`
      are batches, so its rows would be `(8, …)`: give the source itself, or `iter(batches)`.
    - `layout`: "contiguous", which `hdf5` maps into memory, beginning at a page; or "chunked", by samples: whole rows, about
      1 MiB of them. Default: contiguous where the number of rows is known, as of arrays, a source, or by `length`.
    - `chunks` (rows to a chunk, or the shape of one), `compression` (as h5py has it: "gzip", "lzf", a gzip level, or one of
      hdf5plugin's), `shuffle` (the bytes of numbers, before compression), `checksum` (fletcher32, verified by whoever
      reads): each makes datasets chunked.
    - `group`: the name of a group that all goes into, or of the dataset where `data` is a bare array.
    - `memory`: about how much of a source is held at a time. `progress`: called with the rows written, and those to come in
      all, of batches as they are written.

    Attributes are not written, also those of a source's file, such as the `scale_factor` of packed numbers: `h5concat`
    copies files with them, into another layout too.

    The file is written beside its place, synced, and renamed: it is there whole, or not at all.

    Raises `DataError` for a file that exists, unless `overwrite`, or cannot be written (a full disk), and
    `ArgumentError` for a leaf that is no array, or of a dtype that HDF5 has not (dates, objects, float8), and for
    batches that differ from the first or are not `length` rows in all. What an iterator raises passes as it is.

    >>> import functrain as ft, numpy as np, tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"train": {"x": torch.zeros(10, 3)}, "test": {"x": np.ones((2, 3), "f4")}})
    >>> ft.hdf5(folder.name + "/a.h5", "test")(1)
    {'x': tensor([1., 1., 1.])}
    >>> ft.h5write(folder.name + "/b.h5", ({"x": np.full((4, 2), n)} for n in range(3)), compression="gzip")
    >>> len(ft.hdf5(folder.name + "/b.h5"))
    12
    >>> folder.cleanup()
    """
    target, prefix = os.fspath(path), prefix_of(group)
    storage = Storage.of(layout, chunks, compression, shuffle, checksum)
    limit = size_of("memory", memory)
    length = None if length is None else integer("length", length, 0)
    if is_stream(data):
        batches, rows = stream(data, prefix, length, limit)
        # Before the file is there: a DataLoader starts its workers now, and sets handlers of signals.
        first, batches = begun(batches)
        if rows is None and layout == "contiguous":
            raise ArgumentError("contiguous datasets cannot grow: say how many rows will come, length=…, or leave layout out")
        with replacing(target, overwrite, align=rows is not None and not storage.chunked) as output:
            _write_stream(output, storage, first, batches, rows, progress)
        return
    if length is not None:
        raise ArgumentError("length says how many rows will come of batches: arrays have theirs")
    arrays = named_arrays(data, prefix)
    with replacing(target, overwrite, align=not storage.chunked) as output:
        for name, array in arrays.items():
            fill(output, storage.create(output.file, name, array.shape, array.dtype), array)


def _write_stream(
    output: Output,
    storage: Storage,
    first: dict[str, np.ndarray],
    batches: Iterator[dict[str, np.ndarray]],
    rows: int | None,
    progress: Callable[[int, int | None], object] | None,
) -> None:
    columns = {name: Appended(output, storage, name, array, rows) for name, array in first.items()}
    done = number = 0
    while (batch := _next(output, batches)) is not None:
        if batch.keys() != columns.keys():
            raise ArgumentError(f"batch {number} has {', '.join(batch)}: the first has {', '.join(columns)}")
        done += len(next(iter(batch.values())))
        if rows is not None and done > rows:
            raise ArgumentError(f"length={rows}, but up to batch {number} there are {done} rows already")
        for name, array in batch.items():
            columns[name].append(array, number)
        number += 1
        if progress is not None:
            with output.elsewhere():
                progress(done, rows)
    if rows is not None and done < rows:
        raise ArgumentError(f"length={rows}, but the batches hold {done} rows in all")
    for column in columns.values():
        column.end()


def _next(output: Output, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray] | None:
    with output.elsewhere():
        return next(batches, None)


__all__ = ["h5write"]
