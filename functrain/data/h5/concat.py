"""Joining HDF5 files along one or two axes, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from functrain.core.errors import ArgumentError
from functrain.data.budget import size_of
from functrain.data.h5.chunking import Storage
from functrain.data.h5.files import intact, open_file
from functrain.data.h5.joining import Progress, fill_value, write_joined
from functrain.data.h5.members import Members, copy_attributes, members
from functrain.data.h5.output import Output, check_free, replacing
from functrain.data.h5.parts import joined
from functrain.data.h5.virtual import behind, write_virtual
from functrain.data.source import integer

Path = str | os.PathLike[str]


def h5concat(
    destination: Path,
    sources: Sequence[Path] | Sequence[Sequence[Path]],
    axis: int | tuple[int, int] = 0,
    *,
    overwrite: bool = False,
    memory: int | str = "64 MiB",
    virtual: bool = False,
    fill: Any = None,
    layout: str | None = None,
    chunks: int | tuple[int, ...] | None = None,
    compression: Any = None,
    shuffle: bool = False,
    checksum: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Join every dataset of HDF5 files, in all groups, along `axis` (negative ones count from the end).

    With two axes, `sources` is a list of rows: rows follow one another along the first, files in a row along the second.
    All files hold the same datasets, of the same dtype and of the same shape but for the axes. The result has the
    attributes and the layout of the first file, is there whole or not at all, and at most `memory` bytes of data are
    held at a time. Attributes that say what numbers stand for (`scale_factor`, `_FillValue` …) are the same in all files.
    One file alone is copied, scalars too: into another layout, with its attributes.

    Stored chunks are copied as they are (at about the speed of `cp`; checksums are verified, compressed data are not decoded)
    where chunks and filters agree with the result's and all but the last file fill whole chunks; everything else is
    decoded and encoded again. `layout`, `chunks`, `compression`, `shuffle`, `checksum`: another layout, as in `h5write`.

    - `virtual`: the result holds no data, and refers to the sources: by relative paths to those beside it. HDF5 reads fill
      values, without a word, where a source is moved away later; `hdf5` and `h5concat` look whether all are there.
    - `fill`: stands where datasets are missing or shorter than others, which is an error without it; numbers of
      different dtypes get the one that holds them all, and lie contiguous unless a layout is asked for. A file that is
      not there is an error all the same.
    - `progress`: called with the bytes that are done and the bytes in all, as decoded.

    Raises `DataError`, before anything is written, for a file or dataset that is missing in one place, dtypes, shapes or
    such attributes that disagree, a dataset without that axis, and a destination that exists, unless `overwrite`; and,
    leaving no destination, for a source that is damaged and a disk that is full.

    >>> import functrain as ft, numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> parts = [f"{folder.name}/{n}.h5" for n in range(3)]
    >>> for n, part in enumerate(parts):
    ...     ft.h5write(part, {"x": np.full(2, n)})
    >>> ft.h5concat(folder.name + "/all.h5", parts)
    >>> ft.readmmap(folder.name + "/all.h5", "x").tolist()
    [0, 0, 1, 1, 2, 2]
    >>> folder.cleanup()
    """
    target = os.fspath(destination)
    axes, grid = _grid(sources, axis)
    limit = size_of("memory", memory)
    storage = Storage.of(layout, chunks, compression, shuffle, checksum)
    if virtual and storage.given:
        raise ArgumentError("a virtual dataset has the layout of its sources: leave layout, chunks and filters out")
    check_free(target, overwrite)
    with ExitStack() as stack:
        files = _opened(stack, grid)
        if os.path.exists(target) and any(os.path.samefile(target, path) for path in files):
            raise ArgumentError(f"the destination {target!r} is one of the sources: choose another path")
        scalars = _scalars(files, grid)
        cells = [[files[path] for path in row] for row in grid]
        plan = list(joined(cells, axes, fill is not None))
        if virtual and os.path.exists(target) and any(os.path.samefile(target, path) for path in behind(plan)):
            raise ArgumentError(f"the destination {target!r} holds data that a virtual source refers to: choose another path")
        fills = {each.name: fill_value(each, fill) for each in plan}
        aligned = not storage.chunked and all(each.model.chunks is None for each in plan)
        output = stack.enter_context(replacing(target, overwrite, align=aligned))
        _make_groups(output, list(files.values())[: None if fill is not None else 1])
        for name, scalar in scalars.items():
            with intact(f"dataset {name!r} in {grid[0][0]!r}"):
                scalar.file.copy(scalar, output.file, name, without_attrs=True)
            copy_attributes(scalar, output.file[name], grid[0][0])
        state = Progress(output, progress, 0 if virtual else sum(part.bytes for each in plan for part in each.parts))
        for each in plan:
            if virtual:
                dataset = write_virtual(output.file, each, os.path.dirname(os.path.abspath(target)), fills[each.name])
                output.check()
            else:
                dataset = write_joined(output, each, storage, fills[each.name], limit, state)
            copy_attributes(each.model, dataset, each.parts[0].path)
        state.end()


def _scalars(files: dict[str, Members], grid: list[list[str]]) -> dict[str, Any]:
    """Datasets without axes, taken out of a file that is alone: they are copied, as there is nothing to join them to."""
    if len(grid) > 1 or len(grid[0]) > 1:
        return {}
    datasets = files[grid[0][0]].datasets
    return {name: datasets.pop(name) for name in list(datasets) if not datasets[name].shape}


def _make_groups(output: Output, files: Iterable[Members]) -> None:
    """The groups of these files, with the attributes of the first that has them."""
    done: set[str] = set()
    for one in files:
        for name, group in one.groups.items():
            if name not in done:
                copy_attributes(group, output.file.require_group(name), one.path)
        done.update(one.groups)


def _grid(sources: Any, axis: Any) -> tuple[tuple[int, int | None], list[list[str]]]:
    """The axes, and the paths by rows: one a row where there is one axis."""
    if isinstance(sources, (str, os.PathLike)):
        raise ArgumentError(f"sources takes a list of paths, got one: {os.fspath(sources)!r}")
    rows = list(sources)
    if not rows:
        raise ArgumentError("sources is empty: name at least one file")
    nested = [isinstance(row, Sequence) and not isinstance(row, str) for row in rows]
    if isinstance(axis, tuple):
        if len(axis) != 2 or not all(nested) or not all(rows):
            raise ArgumentError(f"two axes take lists of paths: [[a, b], [c, d]], axis=(0, 1); got axis={axis!r}, {rows!r}")
        return (integer("axis", axis[0]), integer("axis", axis[1])), [[os.fspath(path) for path in row] for row in rows]
    if any(nested):
        raise ArgumentError(f"a list of lists of paths is joined along two axes: axis=(0, 1), got axis={axis!r}")
    return (integer("axis", axis), None), [[os.fspath(path)] for path in rows]


def _opened(stack: ExitStack, grid: list[list[str]]) -> dict[str, Members]:
    """What each file holds, by path: one handle a path, as a file may be named twice."""
    found: dict[str, Members] = {}
    for path in (path for row in grid for path in row):
        if path in found:
            continue
        file = stack.enter_context(open_file(path))
        with intact(repr(path)):
            found[path] = members(file, path)
    return found


__all__ = ["h5concat"]
