"""The raw bytes of a file, read at any offset by any thread."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from functrain.core.errors import DataError


class Bytes(Protocol):
    """A file's bytes; `read` may be called by many threads at once, and on both sides of a fork."""

    path: str

    def size(self) -> int:
        """How long the file is now."""
        ...

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Exactly `size` bytes from `offset`; `DataError` where the file ends before."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class _Descriptor:
    """An open file, closed when nobody reads from it any more: its number may be another file's from then on."""

    def __init__(self, path: str) -> None:
        # Not waiting: a FIFO may have taken the file's place.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalBytes:
    """The bytes of a file on this machine: the one that was there when it was opened, whatever takes its place."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file: _Descriptor | None = _Descriptor(path)
        except OSError as error:
            raise DataError(f"{path!r} cannot be opened: {error}") from error

    def _open(self) -> _Descriptor:
        file = self._file
        if file is None:
            raise DataError(f"{self.path!r} was closed")
        return file

    def size(self) -> int:
        file = self._open()
        return os.fstat(file.number).st_size

    def read(self, offset: int, size: int) -> memoryview:
        # Before memory is taken: a damaged size may be anything.
        if offset + size > self.size():
            raise self._short(offset + size)
        buffer = np.empty(size, np.uint8)
        self.fill(offset, buffer)
        return buffer.data

    def fill(self, offset: int, buffer: np.ndarray) -> None:
        """Exactly the bytes from `offset` that `buffer`, uint8, has room for: without memory of their own."""
        file = self._open()
        done = 0
        try:
            while done < len(buffer):
                # The system gives at most 2 GiB at once.
                got = os.preadv(file.number, [buffer[done:].data], offset + done)
                if not got:
                    raise self._short(offset + len(buffer))
                done += got
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{self.path!r} cannot be read at byte {offset + done}: {error}") from error

    def check(self, end: int, name: str) -> None:
        """Raise `DataError` if the file has become shorter than the `end` bytes that the dataset `name` needs."""
        size = self.size()
        if size < end:
            raise DataError(f"{self.path!r} shrank to {size} bytes since it was opened; dataset {name!r} needs {end}")

    def shrunk(self, name: str) -> DataError:
        """The error for a file of which a part could not be read, whose size is again what the dataset `name` needs."""
        return DataError(f"{self.path!r} was cut short, or its disk failed, while dataset {name!r} was read: open it again")

    def map(self, start: int, stop: int) -> tuple[mmap.mmap, int]:
        """The bytes from start to stop as read-only memory, and how many lie before them in it."""
        if self.size() < stop:
            raise self._short(stop)
        skipped = start % mmap.ALLOCATIONGRANULARITY
        file = self._open()
        try:
            return mmap.mmap(file.number, stop - start + skipped, access=mmap.ACCESS_READ, offset=start - skipped), skipped
        except (OSError, ValueError, OverflowError) as error:
            raise DataError(f"{self.path!r} cannot be mapped into memory: {error}") from error

    def _short(self, end: int) -> DataError:
        return DataError(f"{self.path!r} ends at {self.size()} bytes, before byte {end}: it was cut short")

    def close(self) -> None:
        self._file = None


def is_url(path: str) -> bool:
    """Whether a path is that of a file elsewhere, for fsspec to find.

    >>> is_url("s3://bucket/a.h5"), is_url("/data/a.h5")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://", path) is not None


def open_bytes(path: str, storage: Mapping[str, Any] | None = None) -> Bytes:
    """The bytes of the file at a path or URL; `storage` has the options for a URL."""
    if not is_url(path):
        return LocalBytes(path)
    from functrain.data.h5.remote import RemoteBytes

    return RemoteBytes(path, storage)
