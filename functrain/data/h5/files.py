"""Opening HDF5 files: what is wrong with one, in words, and a handle for each process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from functrain.core.errors import ArgumentError, DataError, FunctrainError
from functrain.data.h5.growing import current
from functrain.data.h5.links import Walk, check_regular, in_bytes
from functrain.data.h5.raw import Bytes, is_url, open_bytes

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
def opened(path: str, *, swmr: bool = False, storage: Mapping[str, Any] | None = None) -> Iterator[h5py.File]:
    """The file at `path`, open for reading; `DataError` that says what is wrong where it cannot be opened.

    With `swmr`, a file that another process appends to in HDF5's SWMR mode. A URL is read through fsspec, with the options
    in `storage` (see `functrain.data.h5.remote`).
    """
    handle = Handle(path, swmr=swmr, storage=storage)
    try:
        yield handle.here()
    finally:
        handle.close()


def open_file(path: str, *, swmr: bool = False) -> h5py.File:
    """Like `opened`, a file on this machine, for the caller to close."""
    import h5py

    if not os.path.exists(path):
        raise DataError(f"no file {path!r} (in {os.path.abspath(os.path.dirname(path) or '.')!r})")
    check_regular(path)
    try:
        return h5py.File(path, "r", swmr=swmr)
    except FAILURES as error:
        raise _explained(path, os.path.getsize(path), error) from error


def _explained(path: str, size: int, error: Exception) -> DataError:
    """Why HDF5 could not open the file, in words."""
    text = str(error)
    if isinstance(error, PermissionError):
        return DataError(f"{path!r} cannot be read: permission denied. Ask for the right to read it, or copy it ({text})")
    if "unable to lock file" in text:
        return DataError(
            f"{path!r} cannot be opened: a writer has it open. Read it when it has been closed; what is appended to in HDF5's "
            f"SWMR mode is read meanwhile with swmr=True ({text})"
        )
    if "already open for write" in text:
        return DataError(
            f"{path!r} cannot be opened: a writer has it open in SWMR mode, and swmr=True reads it. If there is none (it was "
            f"killed), the file says so still: h5clear -s takes that off ({text})"
        )
    if "truncated" in text:
        return DataError(f"{path!r} is truncated: it is shorter than its own header says. Write it again ({text})")
    if not size:
        return DataError(f"{path!r} is empty (0 bytes), not an HDF5 file: was its writing cut short?")
    if "signature not found" in text:
        return DataError(f"{path!r} is not an HDF5 file ({size} bytes, without HDF5's signature)")
    return DataError(f"{path!r} {'cannot be opened' if isinstance(error, OSError) else 'is damaged'}: {text}")


def found(file: h5py.File, path: str, name: str | None, *, root: str | None = None) -> h5py.Group | h5py.Dataset:
    """The group or dataset called `name`; `DataError` that lists what there is where it is missing.

    Links lead where they lead, but in circles and to what is no regular file; with `root`, a folder, not out of it either:
    neither external links nor the sources of virtual datasets and external storage.
    """
    import h5py

    if name is None or not name.strip("/"):
        with intact(repr(path)):
            return file["/"]
    walk = Walk(root)
    try:
        # HDF5 would take the name to end there, and find another thing.
        if "\0" in name:
            raise KeyError("a name holds no null character")
        walk.links(file, name)
        item = file[in_bytes(name)]
        if isinstance(item, h5py.Dataset):
            walk.storage(item, name)
            current(item)
        return item
    except FunctrainError:
        raise
    except FAILURES as error:
        if walk.trail:
            raise DataError(f"{name!r} in {path!r} leads nowhere, by the link {' → '.join(walk.trail)} ({error})") from error
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
        names = [os.fsdecode(name) for name in item] if isinstance(item, h5py.Group) else []
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
    """The h5py handle of each process, on a file here or behind a URL: one made before a fork must not be used after it."""

    def __init__(self, path: str, *, swmr: bool = False, storage: Mapping[str, Any] | None = None) -> None:
        self.path, self.swmr = path, swmr
        self.remote = is_url(path)
        if swmr and self.remote:
            raise DataError(f"{path!r} is remote: swmr=True reads files on this machine")
        if storage is not None and not self.remote:
            raise ArgumentError(f"storage= is for URLs, such as 's3://bucket/file.h5', and {path!r} is a file on this machine")
        self._storage = storage
        self._raw: dict[str, Bytes] = {}
        self._handles: dict[int, Any] = {}
        self._closed = False
        self._seen: tuple[int, int] | None = None

    def here(self) -> h5py.File:
        """The file, open in this process."""
        pid = os.getpid()
        handle = self._handles.get(pid)
        if handle is None:
            if self._closed:
                raise DataError(f"{self.path!r} was closed")
            # Two threads may both open it: the first to come stays, without a lock that a fork could leave held.
            mine = self._opened()
            handle = self._handles.setdefault(pid, mine)
            if handle is not mine:
                mine.close()
        return handle

    def raw(self) -> Bytes:
        """The file's bytes: for all threads and processes, closed with the handle."""
        raw = self._raw.get(self.path)
        if raw is None:
            mine = open_bytes(self.path, self._storage)
            raw = self._raw.setdefault(self.path, mine)
            if raw is not mine:
                mine.close()
        return raw

    def _opened(self) -> h5py.File:
        import h5py

        from functrain.data.h5.remote import RemoteBytes, RemoteFile

        raw = self.raw() if self.remote else None
        if not isinstance(raw, RemoteBytes):
            return self._same(open_file(self.path, swmr=self.swmr))
        try:
            return h5py.File(RemoteFile(raw), "r")
        except FunctrainError:
            raise
        except FAILURES as error:
            raise _explained(self.path, raw.size(), error) from error

    def _same(self, file: h5py.File) -> h5py.File:
        """The file, if it is the one that was there when it was first opened: after a fork, it is opened again."""
        status = os.stat(self.path)
        found = status.st_dev, status.st_ino
        if self._seen not in (None, found):
            file.close()
            raise DataError(f"{self.path!r} was replaced since it was opened: make the source again with hdf5(…)")
        self._seen = found
        return file

    def close(self) -> None:
        """Let go of the file, in this process."""
        self._closed = True
        handle, raw = self._handles.pop(os.getpid(), None), self._raw.pop(self.path, None)
        for mine in (handle, raw):
            if mine is not None:
                mine.close()
