"""A new HDF5 file to write to, where a full disk or a Ctrl-C is an error and no crash."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functrain.core.errors import DataError
from functrain.data.atomic import whole_file
from functrain.data.interrupts import held_signals

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class Output:
    """The file, and `check`, to be called after each piece of bounded size that is written to it."""

    file: h5py.File
    check: Callable[[], None]


@contextmanager
def replacing(path: str, overwrite: bool) -> Iterator[Output]:
    """A new HDF5 file that takes the place of `path` when the block ends, and never was when it fails.

    Raises `DataError` for a file that exists, unless `overwrite`, for a directory that does not, and where the
    file cannot be written.
    """
    import h5py

    check_free(path, overwrite)
    try:
        with whole_file(path) as beside:
            with _Disk(beside) as disk, held_signals() as deliver:

                def check() -> None:
                    deliver()
                    disk.check()

                with h5py.File(disk, "w") as file:
                    yield Output(file, check)
                check()
            check_free(path, overwrite)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path!r} could not be written: {error}") from error


def check_free(path: str, overwrite: bool) -> None:
    """Raise `DataError` where a file cannot be put at `path`."""
    if "\0" in path:
        raise DataError(f"{path!r} is no path of a file: it holds a null character")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise DataError(f"no directory {folder!r} to write {path!r} into: make it first")
    if os.path.isdir(path):
        raise DataError(f"{path!r} is a directory: give the path of a file")
    if not overwrite and os.path.exists(path):
        raise DataError(f"{path!r} exists: pass overwrite=True to replace it, or choose another path")


class _Disk(io.RawIOBase):
    """The bytes of the new file, as HDF5 sees them: writing them never fails.

    HDF5 2.0 cannot close a file whose last writes failed, and dies of it (SIGSEGV). So the first failure is kept
    for `check`, and what cannot be written from then on is kept in memory, so that it reads back: the piece under
    way, and HDF5's own records. Signals must be held meanwhile: an exception on entering a method is a failure too.

    Through this, 200 MB were written as fast as by HDF5's own driver, contiguous, in chunks of 1 MiB, and with
    lzf; in chunks of 8 KiB, at one call each, they took 1.4 times as long.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "x+")
        self._place = 0
        self._failure: OSError | None = None
        self._unwritten: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence, self._size())
        return self._place

    def tell(self) -> int:
        return self._place

    def _size(self) -> int:
        kept = max((start + len(data) for start, data in self._unwritten), default=0)
        return max(kept, os.fstat(self._file.fileno()).st_size)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        start, self._place = self._place, self._place + len(view)
        if self._failure is None:
            try:
                self._write(start, view)
            except OSError as error:
                self._failure = error
        if self._failure is not None:
            self._unwritten.append((start, bytes(view)))
        return len(view)

    def _write(self, start: int, view: memoryview) -> None:
        self._file.seek(start)
        while len(view):
            # The system takes at most 2 GiB at once, and up to a limit what fits below it.
            view = view[self._file.write(view) or 0 :]

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, self._place = self._place, self._place + len(view)
        self._file.seek(start)
        there = self._file.readinto(view) or 0
        view[there:] = bytes(len(view) - there)
        for place, data in self._unwritten:
            first, last = max(place, start), min(place + len(data), start + len(view))
            if first < last:
                view[first - start : last - start] = data[first - place : last - place]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        length = self._place if size is None else size
        if self._failure is None:
            try:
                self._file.truncate(length)
            except OSError as error:
                self._failure = error
        return length

    def close(self) -> None:
        self._file.close()
        super().close()
