"""Writing arrays to an HDF5 file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.h5.output import Output, replacing
from functrain.data.h5.slabs import slabs
from functrain.data.source import integer

# What h5py would choose splits rows (a 96×96×3 image over 192 chunks): chunks of whole rows, of about this size.
_CHUNK_BYTES = 1 << 20
# Written at once: after each such piece, a full disk or a Ctrl-C ends the writing.
_SLAB_BYTES = 1 << 26


def h5write(
    path: str | os.PathLike[str],
    tree: Tree,
    *,
    group: str | None = None,
    overwrite: bool = False,
    chunks: int | tuple[int, ...] | None = None,
    compression: str | int | None = None,
) -> None:
    """Write a tree of arrays or tensors to a new HDF5 file: dicts become groups, leaves datasets.

    Datasets are contiguous, so that `hdf5` can map them into memory, unless `chunks` (rows to a chunk, or the
    shape of one) or `compression` (as h5py has it: "gzip", "lzf", a gzip level) is given. With `group`, the tree goes into that
    group. The file is written beside its place, synced, and renamed: it is there whole, or not at all.

    Raises `DataError` for a file that exists, unless `overwrite`, or cannot be written (a full disk), and
    `ArgumentError` for a leaf that is no array, or of a dtype that HDF5 has not (dates, objects, float8).

    >>> import functrain as ft, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"train": {"x": torch.zeros(10, 3)}, "test": {"x": np.ones((2, 3), "f4")}})
    >>> ft.hdf5(folder.name + "/a.h5", "test")(1)
    {'x': tensor([1., 1., 1.])}
    >>> folder.cleanup()
    """
    named = [(name, _array(name, leaf)) for name, leaf in _leaves(tree, _prefix(group))]
    if not named:
        raise ArgumentError("the tree has no leaves: there is nothing to write")
    if isinstance(chunks, tuple):
        chunks = tuple(integer("chunks", size, 1) for size in chunks)
    elif chunks is not None:
        chunks = integer("chunks", chunks, 1)
    with replacing(os.fspath(path), overwrite) as output:
        for name, array in named:
            _write(output, name, array, chunks, compression)


def _prefix(group: str | None) -> str:
    if group is not None and not isinstance(group, str):
        raise ArgumentError(f"group takes the name of a group, got {group!r}")
    prefix = (group or "").strip("/")
    if prefix and not all(_nameable(name) for name in prefix.split("/")):
        raise ArgumentError(f"group {group!r} has a name in it that HDF5 has not: expected 'a/b/c' of UTF-8 text")
    return prefix


def _nameable(name: str) -> bool:
    # HDF5 ends a name at a null character, which would be silent, and holds UTF-8, which has no lone surrogates.
    return name not in ("", ".") and "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _leaves(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, value in tree.items():
        if not isinstance(name, str) or "/" in name or not _nameable(name):
            raise ArgumentError(
                f"names in the tree must be UTF-8 strings without '/' and null, got {name!r}: nest dicts to make groups"
            )
        yield from _leaves(value, f"{prefix}/{name}".lstrip("/"))


def _array(name: str, leaf: Any) -> np.ndarray:
    if not name:
        raise ArgumentError("a bare array needs a name: write {'x': array}, or give group='x'")
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided or leaf.is_quantized:
            raise ArgumentError(f"leaf {name!r} is a {leaf.dtype}, {leaf.layout} tensor: HDF5 takes it as .float() and dense")
        try:
            return leaf.detach().cpu().resolve_conj().resolve_neg().numpy()
        except (TypeError, RuntimeError) as error:
            raise ArgumentError(f"leaf {name!r} is a {leaf.dtype} tensor: HDF5 takes it as .float() ({error})") from error
    if not isinstance(leaf, (np.ndarray, np.generic)) or not _storable(leaf.dtype):
        kind = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
        raise ArgumentError(
            f"leaf {name!r} is {kind}: expected tensors, or NumPy arrays of numbers or bytes (dates as .astype('int64'))"
        )
    return np.asarray(leaf)


def _storable(dtype: np.dtype) -> bool:
    import h5py

    # Dtypes of other packages (bfloat16) would be written as bytes without a meaning.
    if dtype.kind in "OU" or dtype.isbuiltin == 2:
        return False
    try:
        h5py.h5t.py_create(dtype, logical=True)
    except TypeError:
        return False
    return True


def _write(
    output: Output,
    name: str,
    array: np.ndarray,
    chunks: int | tuple[int, ...] | None,
    compression: str | int | None,
) -> None:
    if (chunks is None and compression is None) or array.size == 0 or array.ndim == 0:
        chunks = compression = None
    elif not isinstance(chunks, tuple):
        row = max(1, math.prod(array.shape[1:])) * array.itemsize
        rows = max(1, _CHUNK_BYTES // row) if chunks is None else chunks
        chunks = (min(rows, len(array)), *array.shape[1:])
    try:
        dataset = output.file.create_dataset(name, array.shape, array.dtype, chunks=chunks, compression=compression)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(
            f"chunks {chunks} or compression {compression!r} do not suit {name!r} {array.shape}: {error}"
        ) from error
    for slab in slabs(array.shape, array.itemsize, _SLAB_BYTES, chunks):
        dataset.write_direct(np.ascontiguousarray(array[slab]), None, slab)
        output.check()
