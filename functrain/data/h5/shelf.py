"""The open files of a source: opened when they are read, a bounded number of them at a time."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType

from functrain.core.errors import DataError
from functrain.data.h5.access import Access
from functrain.data.h5.layout import Layout
from functrain.data.h5.pool import Pool
from functrain.data.h5.raw import is_url
from functrain.data.h5.readers import Reader
from functrain.data.source import Source

Identity = tuple[int, ...] | None


def identity(path: str) -> Identity:
    """What tells a file from another of the same name, or from itself before it was written again; None for one elsewhere."""
    if is_url(path):
        return None
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"no file {path!r}: {error}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class OpenFile:
    """One file with the readers of its datasets; closed when nobody holds it any more."""

    def __init__(self, access: Access, path: str, pool: Pool) -> None:
        self._readers = access.readers(path, pool)
        self._made: dict[tuple[str, int], Reader] = {}
        self.close = weakref.finalize(self, self._readers.close)

    def reader(self, layout: Layout) -> Reader:
        """The reader of a dataset, to be used while the file is held."""
        reader = self._made.get((layout.name, layout.axis))
        return reader or self._made.setdefault((layout.name, layout.axis), self._readers.reader(layout))


class Shelf:
    """The files of one source, which share a budget of bytes and a pool of threads.

    At most an eighth as many are open at a time as the system lets a process open files; those that were opened first are
    closed first, and opened again when they are read. A file that was replaced meanwhile is a `DataError`.
    """

    def __init__(self, access: Access, files: Mapping[str, Identity]) -> None:
        self._access, self._identities = access, files
        self.threads = access.threads
        self._pool = Pool(access.threads)
        self._open: dict[str, OpenFile] = {}
        self.closed = False
        self._most = _most()
        weakref.finalize(self, self._pool.stop)

    def __reduce__(self) -> tuple[type[Shelf], tuple[Access, Mapping[str, Identity]]]:
        # Another process opens the files itself.
        return Shelf, (self._access, self._identities)

    def file(self, path: str) -> OpenFile:
        """One of the files, open for as long as it is held."""
        if self.closed:
            raise DataError(f"the source over {path!r} was closed: open it again with hdf5(…)")
        file = self._open.get(path)
        if file is None:
            # Without a lock, which a fork could leave held: two threads may both open it, and the first to come stays.
            mine = OpenFile(self._access, path, self._pool)
            if self._other(path):
                raise DataError(f"{path!r} was replaced or changed since this source was made: make it again with hdf5(…)")
            file = self._open.setdefault(path, mine)
            while len(self._open) > self._most:
                # Dropped, not closed: another thread may be reading from it.
                self._open.pop(next(iter(tuple(self._open))), None)
        return file

    def _other(self, path: str) -> bool:
        now, then = identity(path), self._identities[path]
        # One that grows is itself as long as it is the same file.
        return now[:2] != then[:2] if self._access.swmr and now and then else now != then

    def close(self) -> None:
        """Let go of all files, end the threads."""
        self.closed = True
        while self._open:
            self._open.popitem()[1].close()
        self._pool.close()


def _most() -> int:
    """How many files may be open: each takes up to three descriptors, and the program has files of its own."""
    if sys.platform == "win32":
        return 64
    import resource

    return min(max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8), 4096)


class FileSource(Source):
    """A source that reads from files, until it is closed."""

    _shelf: Shelf
    again: Callable[[], FileSource]

    def refreshed(self) -> FileSource:
        """A new source over what the files hold now: files that grow (`swmr`) have grown, a pattern may match more of them.

        This one keeps its length, so that an epoch ends where it was to end; call it between epochs, and close the old one.
        """
        return self.again()

    def close(self) -> None:
        """Let go of the files; reading from this source, or one made from it, is a `DataError` from now on."""
        self._shelf.close()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
