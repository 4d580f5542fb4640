"""Writing a file so that it is there whole, or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file or folder on the disk itself, not only in the system's cache, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` in one move at the end of the block, or never.

    A reader sees the old file or the new one, also when the process is killed or the power goes. A failure is an `OSError`.
    """
    final = Path(path).absolute()
    # In the same folder, as a move is atomic within one file system only; with a name of its own, as two writers
    # of one file must not write into each other's.
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with suppress(FileNotFoundError):
            # Who may read the old one may read the new one, and nobody else.
            temporary.chmod(stat.S_IMODE(final.stat().st_mode))
        sync(temporary)
        os.replace(temporary, final)
        sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)
