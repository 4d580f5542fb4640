"""What can be written to a file: arrays, and batches of them, by the names of the datasets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.source import Source

# Rows of a source are taken so many bytes at a time, unless a limit is given that allows for less.
_TAKEN = 1 << 23


def prefix_of(group: str | None) -> str:
    """The name of a group without slashes around it; `ArgumentError` for what HDF5 cannot call a group."""
    if group is not None and not isinstance(group, str):
        raise ArgumentError(f"group takes the name of a group, got {group!r}")
    prefix = (group or "").strip("/")
    if prefix and not all(_nameable(name) for name in prefix.split("/")):
        raise ArgumentError(f"group {group!r} has a name in it that HDF5 has not: expected 'a/b/c' of UTF-8 text")
    return prefix


def _nameable(name: str) -> bool:
    # HDF5 ends a name at a null character, which would be silent, and holds UTF-8, which has no lone surrogates.
    return name not in ("", ".") and "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def named_arrays(data: Tree, prefix: str) -> dict[str, np.ndarray]:
    """The leaves of a tree of arrays by the names of their datasets: keys, fields and places, joined by slashes."""
    named = {name: _array(name, leaf) for name, leaf in _leaves(data, prefix)}
    if not named:
        raise ArgumentError("the tree has no leaves: there is nothing to write")
    return named


def _leaves(data: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        data = dict(zip(data._fields, data))
    elif isinstance(data, (tuple, list)) and any(isinstance(item, (np.ndarray, Tensor, Mapping, tuple)) for item in data):
        data = {str(place): item for place, item in enumerate(data)}
    if not isinstance(data, Mapping):
        yield prefix, data
        return
    for name, value in data.items():
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


def is_stream(data: Any) -> bool:
    """Whether these are batches that come one after another, and no tree of arrays."""
    if isinstance(data, Dataset) and not isinstance(data, Source):
        raise ArgumentError("a torch Dataset gives examples one by one: write ft.source(dataset), or a DataLoader over it")
    return isinstance(data, (Source, Iterable)) and not isinstance(data, (Mapping, tuple, np.ndarray, Tensor, str, bytes))


def stream(data: Any, prefix: str, length: int | None, memory: int) -> tuple[Iterator[dict[str, np.ndarray]], int | None]:
    """Batches as arrays `(N, …)` by name, and how many rows there will be in all; None where nobody knows."""
    if isinstance(data, Source):
        source = data.undeferred("h5write")
        rows = source.length if length is None else length
        if rows is None:
            raise ArgumentError("this source has no end: say how many elements are to be written, length=…")
        if source.length is not None and rows > source.length:
            raise ArgumentError(f"length={rows}, but the source has {source.length} elements: source.repeat() goes on")
        return (named_arrays(batch, prefix) for batch in _taken(source, rows, memory)), rows
    return (_rows(batch, prefix, number) for number, batch in enumerate(data)), length


def _taken(source: Source, rows: int, memory: int) -> Iterator[Tree]:
    """The elements in order, as many at a time as fit into an eighth of `memory`."""
    if not rows:
        raise ArgumentError("the source has no elements: there is nothing to write")
    first = source.take(np.arange(1), 0)
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(first)) or 1
    step = max(1, min(_TAKEN, memory // 8) // size)
    for start in range(0, rows, step):
        yield source.take(np.arange(start, min(start + step, rows)), 0)


def _rows(batch: Tree, prefix: str, number: int) -> dict[str, np.ndarray]:
    arrays = named_arrays(batch, prefix)
    sizes = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        seen = ", ".join(f"{name!r}: {array.shape}" for name, array in arrays.items())
        raise ArgumentError(f"the arrays of batch {number} must have the same first dimension N; got {seen}")
    return arrays


def begun(batches: Iterator[dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], Iterator[dict[str, np.ndarray]]]:
    """The first batch, and all of them; `ArgumentError` where there is none."""
    first = next(batches, None)
    if first is None:
        raise ArgumentError("there are no batches: nothing is known of what to write")
    return first, itertools.chain([first], batches)


__all__ = ["begun", "is_stream", "named_arrays", "prefix_of", "stream"]
