"""Opening HDF5 files: what is wrong with one, in words, and a handle for each process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from functrain.core.errors import DataError, FunctrainError

if TYPE_CHECKING:
    import h5py


# On a damaged file, h5py raises nearly anything: of 1050 that were cut or had bytes changed, 69 gave other errors
# than OSError.
FAILURES = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError, AttributeError)


@contextmanager
def intact(what: str) -> Iterator[None]:
    """What h5py raises in the block becomes a `DataError` that names `what`; errors of functrain pass."""
    try:
        yield
    except FunctrainError:
        raise
    except FAILURES as error:
        raise DataError(f"{what} cannot be read, and may be damaged: {error}") from error


@contextmanager
def opened(path: str) -> Iterator[h5py.File]:
    """The file at `path`, open for reading; `DataError` that says what is wrong where it cannot be opened."""
    file = open_file(path)
    try:
        yield file
    finally:
        file.close()


def open_file(path: str) -> h5py.File:
    """Like `opened`, for the caller to close."""
    import h5py

    if not os.path.exists(path):
        raise DataError(f"no file {path!r} (in {os.path.abspath(os.path.dirname(path) or '.')!r})")
    if os.path.isdir(path):
        raise DataError(f"{path!r} is a directory, not an HDF5 file")
    try:
        return h5py.File(path, "r")
    except FAILURES as error:
        text = str(error)
        if "truncated" in text:
            raise DataError(
                f"{path!r} is truncated: it is shorter than its own header says. Write it again ({text})"
            ) from error
        if "signature not found" in text:
            size = os.path.getsize(path)
            raise DataError(f"{path!r} is not an HDF5 file ({size} bytes, without HDF5's signature)") from error
        what = "cannot be opened" if isinstance(error, OSError) else "is damaged"
        raise DataError(f"{path!r} {what}: {text}") from error


def found(file: h5py.File, path: str, name: str | None) -> h5py.Group | h5py.Dataset:
    """The group or dataset called `name`; `DataError` that lists what there is where it is missing."""
    if name is None or not name.strip("/"):
        with intact(repr(path)):
            return file["/"]
    try:
        # HDF5 would take the name to end there, and find another thing.
        if "\0" in name:
            raise KeyError("a name holds no null character")
        return file[name]
    except FAILURES as error:
        raise DataError(f"{path!r} has no {name!r}: {_near(file, name)} ({error})") from error


def _near(file: h5py.File, name: str) -> str:
    """What there is where `name` was sought."""
    import h5py

    parent = os.path.dirname(name.strip("/")) or "/"
    try:
        near = file.get(parent)
        if near is None:
            return f"nor has it {parent!r}; it holds {listing(file)}"
        return f"{parent!r} holds {listing(near)}" if isinstance(near, h5py.Group) else f"{parent!r} is no group"
    except FAILURES:
        return f"{parent!r} cannot be listed"


def listing(item: h5py.Group | h5py.Datatype) -> str:
    """The names in a group, in words, for a message: of a damaged one too."""
    import h5py

    try:
        names = list(item) if isinstance(item, h5py.Group) else []
    except FAILURES as error:
        return f"what cannot be listed ({error})"
    return (", ".join(repr(name) for name in names[:20]) + (" …" if len(names) > 20 else "")) or "nothing"


def dataset_of(item: Any, path: str, name: str) -> h5py.Dataset:
    """The item, which is a dataset; `DataError` that says what it is where it is none."""
    import h5py

    if isinstance(item, h5py.Group):
        raise DataError(f"{name!r} in {path!r} is a group, not a dataset: it holds {listing(item)}")
    if not isinstance(item, h5py.Dataset):
        raise DataError(f"{name!r} in {path!r} is a named datatype, not a dataset")
    return item


class Handle:
    """The h5py handle of each process: one made before a fork must not be used after it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._handles: dict[int, Any] = {}

    def here(self) -> h5py.File:
        pid = os.getpid()
        handle = self._handles.get(pid)
        if handle is None:
            # Two threads may both open it: the first to come stays, without a lock that a fork could leave held.
            mine = open_file(self.path)
            handle = self._handles.setdefault(pid, mine)
            if handle is not mine:
                mine.close()
        return handle

    def close(self) -> None:
        handle = self._handles.pop(os.getpid(), None)
        if handle is not None:
            handle.close()
