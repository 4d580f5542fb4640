"""Labels: the class of each element, or the group that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from functrain.core.errors import ArgumentError
from functrain.data.source import Source


def classes(labels: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes that there are, in ascending order, and the number of its class for each label."""
    if isinstance(labels, str):
        raise ArgumentError(
            f"labels are an array, one for each element, got the name {labels!r}: give the labels themselves, of a dataset "
            f"of numbers functrain.hdf5(path, {labels!r}), of strings h5py.File(path)[{labels!r}][:], of several files or "
            "groups source.groups, one for each"
        )
    values = _array(labels)
    if values.ndim != 1:
        advice = "; of one-hot labels, take the place of the one: labels.argmax(1)" if values.ndim == 2 else ""
        raise ArgumentError(f"labels are (n,), one for each element, got {values.shape}{advice}")
    if len(values) != length:
        raise ArgumentError(f"labels are one for each element: the source has {length:,}, got {len(values):,} labels")
    unlabelled = np.flatnonzero([label is None or (isinstance(label, float) and label != label) for label in values.tolist()])
    if unlabelled.size:
        place = int(unlabelled[0])
        raise ArgumentError(
            f"{unlabelled.size:,} of {length:,} elements have no label (label {place} is {values[place]}): leave them out"
        )
    if values.dtype.kind == "O":
        return _ordered(values.tolist())
    names, numbers = np.unique(values, return_inverse=True)
    return names, numbers


_KINDS = (str, bytes, bool, int, float)


def _ordered(labels: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The classes of labels as Python has them, which are of one kind: NumPy would make a string of whatever is beside one."""
    kinds = dict.fromkeys(next((kind for kind in _KINDS if isinstance(label, kind)), type(label)) for label in labels)
    if len(kinds) > 1 or not kinds.keys() <= set(_KINDS):
        listed = ", ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(f"labels are ints or strings, of one kind: got {listed}. Make them alike")
    ascending = sorted(set(labels))
    number_of = {name: number for number, name in enumerate(ascending)}
    names = np.empty(len(ascending), object)
    names[:] = ascending
    return names, np.array([number_of[label] for label in labels], dtype=np.int64)


def without_torch(values: Any) -> Any:
    """A tensor as a NumPy array, anything else as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    mine = values.detach().cpu()
    # NumPy has no bfloat16.
    return (mine.double() if mine.is_floating_point() else mine).numpy()


def _array(labels: Any) -> np.ndarray:
    if isinstance(labels, Source) and labels.finite("labels"):
        labels = labels.take(np.arange(len(labels)), 0)
    labels = without_torch(labels)
    try:
        listed = isinstance(labels, Sequence) and not isinstance(labels, range | bytes)
        values = _objects(labels) if listed else np.asarray(labels)
    except ValueError as error:
        raise ArgumentError(f"labels are an array (n,) of ints or strings: {error}") from error
    if values.dtype.kind not in "biufUSO":
        raise ArgumentError(f"labels are ints or strings, got {type(labels).__name__} of {values.dtype}")
    return _objects(values.tolist()) if values.dtype.kind == "O" and values.ndim == 1 else values


def _objects(labels: Sequence[Any]) -> np.ndarray:
    """A list of labels as they are, NumPy's and torch's own as Python's; of lists, the array that they make."""
    theirs = np.generic | np.ndarray | torch.Tensor
    each = [label.item() if isinstance(label, theirs) and not label.ndim else label for label in labels]
    if any(isinstance(label, list | tuple | np.ndarray | torch.Tensor) for label in each):
        return np.asarray(labels)
    values = np.empty(len(each), object)
    values[:] = each
    return values
