"""The raw bytes of a file, read at any offset by any thread."""

from __future__ import annotations

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


class LocalBytes:
    """The bytes of a file on this machine: the one that was there when it was opened, whatever takes its place."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # Not waiting: a FIFO may have taken the file's place.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{path!r} cannot be opened: {error}") from error

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        # The system gives at most 2 GiB at once, and less at the end of the file.
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size:
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    raise DataError(f"{self.path!r} ends at {self.size()} bytes, before byte {offset + size}: it was cut short")
                data += more
        except OSError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path!r} cannot be read at byte {offset}: {error}") from error
        return data

    def fill(self, offset: int, buffer: np.ndarray) -> None:
        """Exactly the bytes from `offset` that `buffer`, uint8, has room for: without memory of their own."""
        try:
            got = os.preadv(self._descriptor, [buffer.data], offset)
        except OSError as error:
            raise DataError(f"{self.path!r} cannot be read at byte {offset}: {error}") from error
        if got < len(buffer):
            buffer[got:] = np.frombuffer(self.read(offset + got, len(buffer) - got), np.uint8)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


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
