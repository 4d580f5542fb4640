"""Rows of a NumPy array as tensors that own their memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from functrain.data.arguments import places

_KINDS = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)


def readable(dtype: np.dtype) -> bool:
    """Whether torch has this dtype, in whatever byte order.

    >>> readable(np.dtype(">f4")), readable(np.dtype("S3"))
    (True, False)
    """
    return dtype.newbyteorder("=") in _KINDS


def row(array: np.ndarray, i: int) -> Tensor:
    """Row i of `(N, …)`, in native byte order."""
    return tensor(np.array(array[i]))


def rows(array: np.ndarray, indices: np.ndarray) -> Tensor:
    """The rows of `(N, …)` at `indices` `(K,)` (int64), in native byte order: `(K, …)`."""
    run = whole_run(indices)
    return tensor(np.array(array[run]) if run is not None else np.take(array, indices, axis=0))


def tensor(array: np.ndarray) -> Tensor:
    """A tensor over the memory of `array`, which must be the caller's to give; converted to native byte order."""
    if not (array.dtype.isnative and array.flags.c_contiguous):
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(array.shape)
    return torch.from_numpy(array)


def whole_run(indices: np.ndarray) -> slice | None:
    """The slice that `indices` `(K,)` (int64) are, when they count up by one.

    >>> whole_run(np.array([3, 4, 5])), whole_run(np.array([3, 5]))
    (slice(3, 6, None), None)
    """
    first, last = int(indices[0]), int(indices[-1])
    if last - first != len(indices) - 1:
        return None
    # Compared as bytes, in a third of the time of a comparison number by number: this is done for each batch.
    if len(indices) > 2 and indices.tobytes() != np.arange(first, last + 1).tobytes():
        return None
    return slice(first, last + 1)


def selection(indices: np.ndarray, length: int) -> slice | np.ndarray:
    """Positions that a caller gives to `take`, checked as by `places`: the slice that they are, or as they are.

    >>> selection(np.array([3, 4, 5]), 6), selection(np.array([3, 5]), 6)
    (slice(3, 6, None), array([3, 5]))
    """
    checked = isinstance(indices, np.ndarray) and indices.dtype == np.int64 and indices.ndim == 1 and indices.size
    array = indices if checked else places(indices, length)
    run = whole_run(array)
    # Of a run its ends are enough.
    return run if run is not None and run.start >= 0 and run.stop <= length else places(array, length)
