"""The raw bytes of a file, read at any offset by any thread."""

from __future__ import annotations

import os
from typing import Protocol

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
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
