"""One writer at a time in a directory: a lock file, held by a thread of a process until it lets go or dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functrain.core.errors import RunError


class _Hold:
    """An open lock file; -1 when there is none (any more)."""

    def __init__(self) -> None:
        self.handle = -1

    def close(self) -> None:
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)


_held: set[_Hold] = set()


def _let_go() -> None:
    # A forked child has the lock file open too, and the lock lives as long as any such file: a worker that outlives
    # a killed parent would keep the directory locked.
    for hold in _held:
        hold.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def sole_writer(path: str | os.PathLike[str], wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for the block; it is free again when the process ends, in whatever way.

    Only the process that took it holds it: its forked children do not. Raises `RunError` when another process (or
    another thread of this one) holds it, unless told to `wait`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, sole_writer(f"{folder}/lock"):
    ...     with sole_writer(f"{folder}/other"):
    ...         pass
    """
    hold = _Hold()
    _held.add(hold)
    try:
        _lock(Path(path), hold, wait)
        yield
    finally:
        _held.discard(hold)
        hold.close()


def _lock(path: Path, hold: _Hold, wait: bool) -> None:
    try:
        hold.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # Not a record lock (lockf): that one does not keep threads of one process apart.
        fcntl.flock(hold.handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        os.ftruncate(hold.handle, 0)
        os.pwrite(hold.handle, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        raise RunError(
            f"{path.parent} is in use by {_holder(hold.handle)}, which holds {path.name}: "
            "wait for it, stop it, or choose another directory"
        ) from error
    except OSError as error:
        raise RunError(f"could not lock {path}: {error}") from error


def _holder(handle: int) -> str:
    number = os.pread(handle, 80, 0).decode("ascii", "replace")
    if not number:  # it has only just taken the lock
        return "another process or thread"
    return "this process itself" if number == str(os.getpid()) else f"another process (id {number})"
