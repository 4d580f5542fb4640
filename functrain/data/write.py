"""Writing arrays to an HDF5 file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.atomic import replacing

if TYPE_CHECKING:
    import h5py

# What h5py would choose splits rows (a 96×96×3 image over 192 chunks): chunks of whole rows, of about this size.
_CHUNK_BYTES = 1 << 20


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

    Raises `DataError` for a file that exists, unless `overwrite`, and `ArgumentError` for a leaf that is no array.

    >>> import functrain as ft, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"train": {"x": torch.zeros(10, 3)}, "test": {"x": np.ones((2, 3), "f4")}})
    >>> ft.hdf5(folder.name + "/a.h5", "test")(1)
    {'x': tensor([1., 1., 1.])}
    >>> folder.cleanup()
    """
    named = [(name, _array(name, leaf)) for name, leaf in _leaves(tree, group.strip("/") if group else "")]
    if not named:
        raise ArgumentError("the tree has no leaves: there is nothing to write")
    with replacing(os.fspath(path), overwrite) as file:
        for name, array in named:
            _write(file, name, array, chunks, compression)


def _leaves(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, value in tree.items():
        if not isinstance(name, str) or not name or "/" in name or name == ".":
            raise ArgumentError(f"names in the tree must be strings without '/', got {name!r}: nest dicts to make groups")
        yield from _leaves(value, f"{prefix}/{name}".lstrip("/"))


def _array(name: str, leaf: Any) -> np.ndarray:
    if not name:
        raise ArgumentError("a bare array needs a name: write {'x': array}, or give group='x'")
    if isinstance(leaf, Tensor):
        if leaf.dtype is torch.bfloat16 or leaf.layout != torch.strided or leaf.is_quantized:
            raise ArgumentError(f"leaf {name!r} is a {leaf.dtype}, {leaf.layout} tensor: HDF5 takes it as .float() and dense")
        return leaf.detach().cpu().resolve_conj().resolve_neg().numpy()
    if not isinstance(leaf, (np.ndarray, np.generic)) or leaf.dtype.kind in "OU":
        kind = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
        raise ArgumentError(f"leaf {name!r} is {kind}: expected tensors, or NumPy arrays of numbers or bytes")
    return np.asarray(leaf)


def _write(
    file: h5py.File,
    name: str,
    array: np.ndarray,
    chunks: int | tuple[int, ...] | None,
    compression: str | int | None,
) -> None:
    if (chunks is None and compression is None) or array.size == 0 or array.ndim == 0:
        file.create_dataset(name, data=array)
        return
    if not isinstance(chunks, tuple):
        row = max(1, math.prod(array.shape[1:])) * array.itemsize
        rows = max(1, _CHUNK_BYTES // row) if chunks is None else chunks
        chunks = (min(rows, len(array)), *array.shape[1:])
    try:
        file.create_dataset(name, data=array, chunks=chunks, compression=compression)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"chunks {chunks} or compression {compression!r} do not suit {name!r} {array.shape}: {error}"
        ) from error
