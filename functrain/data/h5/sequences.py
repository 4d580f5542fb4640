"""Sequences of variable length, as h5py hands them out."""

from __future__ import annotations

import functools

import numpy as np


def numbers_in(dtype: np.dtype) -> np.dtype | None:
    """The dtype of the numbers in a dataset of sequences; None for any other, of texts too."""
    import h5py

    base = h5py.check_vlen_dtype(dtype)
    return base if isinstance(base, np.dtype) else None


def righted(row: np.ndarray, base: np.dtype) -> np.ndarray:
    """One sequence of `base` numbers `(T,)`, in the byte order that it says."""
    return row if base.isnative or not _swapped() else row.view(base)


@functools.cache
def _swapped() -> bool:
    """Whether h5py hands out sequences of the other byte order as if they were native, with their bytes swapped (3.16 does)."""
    import h5py

    with h5py.File("probe", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("x", (1,), h5py.vlen_dtype(np.dtype(np.uint16).newbyteorder()))
        dataset[0] = np.ones(1, np.uint16)
        return int(dataset[0][0]) != 1


__all__ = ["numbers_in", "righted"]
