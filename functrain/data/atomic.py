"""Writing an HDF5 file so that it is there whole, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from functrain.core.errors import DataError

if TYPE_CHECKING:
    import h5py


@contextmanager
def replacing(path: str, overwrite: bool) -> Iterator[h5py.File]:
    """A new HDF5 file that takes the place of `path` when the block ends, and never was when it fails.

    Raises `DataError` for a file that exists, unless `overwrite`, and for a directory that does not.
    """
    import h5py

    check_free(path, overwrite)
    folder, name = os.path.split(os.path.abspath(path))
    # In the same directory: a rename is atomic within one file system only.
    beside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with h5py.File(beside, "x") as file:
            yield file
        _sync(beside)
        check_free(path, overwrite)
        os.replace(beside, path)
        _sync(folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)


def check_free(path: str, overwrite: bool) -> None:
    """Raise `DataError` where a file cannot be put at `path`."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise DataError(f"no directory {folder!r} to write {path!r} into: make it first")
    if os.path.isdir(path):
        raise DataError(f"{path!r} is a directory: give the path of a file")
    if not overwrite and os.path.exists(path):
        raise DataError(f"{path!r} exists: pass overwrite=True to replace it, or choose another path")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
