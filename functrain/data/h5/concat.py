"""Joining HDF5 files along an axis, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from functrain.core.errors import ArgumentError, DataError
from functrain.data.h5.files import FAILURES, intact, open_file
from functrain.data.h5.layout import check_chunks
from functrain.data.h5.output import Output, check_free, replacing
from functrain.data.h5.slabs import slabs
from functrain.data.source import integer

if TYPE_CHECKING:
    import h5py

Path = str | os.PathLike[str]


def h5concat(
    destination: Path,
    sources: Sequence[Path],
    axis: int = 0,
    *,
    overwrite: bool = False,
    memory: int = 64 * 2**20,
) -> None:
    """Join every dataset of HDF5 files, in all groups, along `axis` (negative ones count from the end).

    All files hold the same datasets, of the same dtype and of the same shape but for the axis. The result is
    contiguous, has the attributes of the first file (but for references), and is there whole or not at all. At
    most `memory` bytes of data are held at a time.

    Raises `DataError`, before anything is written, for a file or dataset that is missing in one place, dtypes or
    shapes that disagree, a dataset without that axis, and a destination that exists, unless `overwrite`.

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
    if isinstance(sources, (str, os.PathLike)):
        raise ArgumentError(f"sources takes a list of paths, got one: {os.fspath(sources)!r}")
    target, paths = os.fspath(destination), [os.fspath(source) for source in sources]
    if not paths:
        raise ArgumentError("sources is empty: name at least one file")
    axis, memory = integer("axis", axis), integer("memory", memory, 1)
    check_free(target, overwrite)
    with ExitStack() as stack:
        files: dict[str, h5py.File] = {}
        for path in paths:
            # One handle a path: a file may be named twice.
            if path not in files:
                files[path] = stack.enter_context(open_file(path))
        if os.path.exists(target) and any(os.path.samefile(target, path) for path in paths):
            raise ArgumentError(f"the destination {target!r} is one of the sources: choose another path")
        members = {}
        for path, file in files.items():
            with intact(repr(path)):
                members[path] = _members(file, path)
        joined = _checked([(path, members[path][1]) for path in paths], axis)
        output = stack.enter_context(replacing(target, overwrite))
        for name, group in members[paths[0]][0].items():
            _copy_attributes(group, output.file.require_group(name), paths[0])
        for name, (datasets, place) in joined.items():
            _join(output, name, datasets, place, memory)


Groups = dict[str, Any]
Datasets = dict[str, Any]


def _members(file: h5py.File, path: str) -> tuple[Groups, Datasets]:
    """All groups and datasets of a file by name; links to datasets count as datasets."""
    import h5py

    groups: Groups = {"/": file["/"]}
    datasets: Datasets = {}
    seen = {h5py.h5o.get_info(file.id).addr}
    pending = ["/"]
    while pending:
        group = groups[pending.pop()]
        for key in group:
            name = f"{group.name.rstrip('/')}/{key}"
            try:
                item = group[key]
            except FAILURES as error:
                raise DataError(f"link {name!r} in {path!r} leads nowhere: {error}") from error
            if isinstance(item, h5py.Dataset):
                datasets[name] = item
            elif isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address in seen or item.file.filename != file.filename:
                    raise DataError(f"{name!r} in {path!r} links to group {item.name!r}: only links to datasets are followed")
                seen.add(address)
                groups[name] = item
                pending.append(name)
    if not datasets:
        raise DataError(f"{path!r} holds no datasets")
    return groups, datasets


def _checked(members: list[tuple[str, Datasets]], axis: int) -> dict[str, tuple[list[h5py.Dataset], int]]:
    first_path, first = members[0]
    for path, datasets in members[1:]:
        for name in first.keys() ^ datasets.keys():
            has, lacks = (first_path, path) if name in first else (path, first_path)
            raise DataError(f"dataset {name!r} is in {has!r}, but not in {lacks!r}: all sources must hold the same datasets")
    joined = {}
    for name, model in first.items():
        with intact(f"dataset {name!r} in {first_path!r}"):
            place = _axis(name, first_path, model, axis)
            check_chunks(model)
        for path, datasets in members[1:]:
            with intact(f"dataset {name!r} in {path!r}"):
                _same(name, model, first_path, datasets[name], path, place)
                check_chunks(datasets[name])
        joined[name] = ([datasets[name] for _, datasets in members], place)
    return joined


def _axis(name: str, path: str, dataset: h5py.Dataset, axis: int) -> int:
    import h5py

    if h5py.check_ref_dtype(dataset.dtype) is not None:
        raise DataError(f"dataset {name!r} in {path!r} holds references, which mean nothing in another file")
    if not dataset.shape:
        raise DataError(f"dataset {name!r} in {path!r} is a scalar: it has no axis to join along (an attribute could hold it)")
    rank = len(dataset.shape)
    if not -rank <= axis < rank:
        raise DataError(
            f"dataset {name!r} in {path!r} has shape {dataset.shape}: axis must lie in {-rank} … {rank - 1}, got {axis}"
        )
    return axis % rank


def _same(name: str, model: h5py.Dataset, first: str, other: h5py.Dataset, path: str, axis: int) -> None:
    if other.dtype != model.dtype:
        raise DataError(f"dataset {name!r} is {model.dtype} in {first!r}, but {other.dtype} in {path!r}: convert one of them")
    if other.shape is None or len(other.shape) != len(model.shape):
        raise DataError(f"dataset {name!r} has shape {model.shape} in {first!r}, but {other.shape} in {path!r}: ranks differ")
    if any(a != b for d, (a, b) in enumerate(zip(model.shape, other.shape)) if d != axis):
        raise DataError(
            f"dataset {name!r} has shape {model.shape} in {first!r}, but {other.shape} in {path!r}: "
            f"they may differ along axis {axis} only"
        )


def _join(output: Output, name: str, datasets: list[h5py.Dataset], axis: int, memory: int) -> None:
    model = datasets[0]
    shape = list(model.shape)
    shape[axis] = sum(dataset.shape[axis] for dataset in datasets)
    joined = output.file.create_dataset(name, tuple(shape), model.dtype)
    _copy_attributes(model, joined, model.file.filename)
    start = 0
    for dataset in datasets:
        for slab in slabs(dataset.shape, dataset.dtype.itemsize, memory, dataset.chunks):
            here = slab[axis]
            there = (*slab[:axis], slice(start + here.start, start + here.stop), *slab[axis + 1 :])
            with intact(f"dataset {name!r} in {dataset.file.filename!r}"):
                block = dataset[slab]
            joined[there] = block
            output.check()
        start += dataset.shape[axis]


def _copy_attributes(origin: Any, target: Any, path: str) -> None:
    import h5py

    with intact(f"the attributes of {origin.name!r} in {path!r}"):
        for key in origin.attrs:
            attribute = origin.attrs.get_id(key)
            inner = [attribute.dtype[field] for field in attribute.dtype.names or ()] + [attribute.dtype]
            inner += [kind for kind in map(h5py.check_vlen_dtype, inner) if isinstance(kind, type(attribute.dtype))]
            # References point into the first file (dimension scales): there is nothing behind them in this one.
            if not any(h5py.check_ref_dtype(kind) for kind in inner):
                target.attrs.create(key, origin.attrs[key], dtype=attribute.dtype)
