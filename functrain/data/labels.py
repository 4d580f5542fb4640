"""Labels: the class of each element, or the group that it belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from functrain.core.errors import ArgumentError


def classes(labels: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes that there are, in ascending order, and the number of its class for each label."""
    values = _array(labels)
    if values.ndim != 1:
        advice = "; of one-hot labels, take the place of the one: labels.argmax(1)" if values.ndim == 2 else ""
        raise ArgumentError(f"labels are (n,), one for each element, got {values.shape}{advice}")
    if len(values) != length:
        raise ArgumentError(f"labels are one for each element: the source has {length:,}, got {len(values):,} labels")
    unlabelled = np.flatnonzero([label is None or label != label for label in values.tolist()])
    if unlabelled.size:
        place = int(unlabelled[0])
        raise ArgumentError(
            f"{unlabelled.size:,} of {length:,} elements have no label (label {place} is {values[place]}): leave them out"
        )
    try:
        names, numbers = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise ArgumentError(f"labels are ints or strings, of one kind: {error}") from error
    return names, numbers


def without_torch(values: Any) -> Any:
    """A tensor as a NumPy array, anything else as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    mine = values.detach().cpu()
    # NumPy has no bfloat16.
    return (mine.double() if mine.is_floating_point() else mine).numpy()


def _array(labels: Any) -> np.ndarray:
    try:
        values = np.asarray(without_torch(labels))
    except ValueError as error:
        raise ArgumentError(f"labels are an array (n,) of ints or strings: {error}") from error
    if values.dtype.kind not in "biufUSO":
        raise ArgumentError(f"labels are ints or strings, got {type(labels).__name__} of {values.dtype}")
    return values
