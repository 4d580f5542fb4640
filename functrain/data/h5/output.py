"""A new HDF5 file to write to, where a full disk or a Ctrl-C is an error and no crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from functrain.core.errors import DataError
from functrain.data.atomic import whole_file
from functrain.data.h5.disk import PAGE, Disk, Piece
from functrain.data.interrupts import Held, held_signals

if TYPE_CHECKING:
    import h5py


class Output:
    """The file, and `check`, to be called after each piece of bounded size that is written to it."""

    def __init__(self, file: h5py.File, disk: Disk, held: Held) -> None:
        self.file = file
        self.failure: OSError | None = None
        self._disk, self._held = disk, held

    def check(self) -> None:
        """Let signals through, and raise where the disk is full."""
        self._held.deliver()
        self._disk.check()

    def place_chunk(self, dataset: h5py.Dataset, offset: tuple[int, ...], piece: Piece, mask: int) -> None:
        """Make the bytes of `piece` the stored chunk at `offset`, as they are."""
        stand_in = self._disk.expect(piece)
        if stand_in is not None:
            dataset.id.write_direct_chunk(offset, stand_in, mask)
        if stand_in is None or not self._disk.met():
            dataset.id.write_direct_chunk(offset, piece.read(), mask)
        if self._disk.full:
            self.check()

    def place_bytes(self, piece: Piece, place: int) -> None:
        """Put the bytes of `piece` at byte `place` of the file, which HDF5 has given to a dataset already."""
        self._disk.copy(piece, place)
        if self._disk.full:
            self.check()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """A block that runs the caller's own code: signals reach it at once, and its errors pass as they are."""
        with self._held.released():
            try:
                yield
            except OSError as error:
                self.failure = error
                raise


@contextmanager
def replacing(path: str, overwrite: bool, align: bool = False) -> Iterator[Output]:
    """A new HDF5 file that takes the place of `path` when the block ends, and never was when it fails.

    With `align`, all that is as large as a page begins at one. Raises `DataError` for a file that exists, unless
    `overwrite`, for a directory that does not, and where the file cannot be written.
    """
    import h5py

    check_free(path, overwrite)
    output: Output | None = None
    aligned = {"alignment_threshold": PAGE, "alignment_interval": PAGE} if align else {}
    try:
        # A link stays one, and what it leads to is replaced.
        with whole_file(os.path.realpath(path)) as beside:
            with Disk(beside) as disk, held_signals() as held:
                with h5py.File(disk, "w", **aligned) as file:
                    output = Output(file, disk, held)
                    yield output
                output.check()
            check_free(path, overwrite)
    except DataError:
        raise
    except OSError as error:
        if output is not None and error is output.failure:
            raise
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
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path!r} is a device, pipe or socket: give the path of a file")
    if not overwrite and os.path.lexists(path):
        raise DataError(f"{path!r} exists: pass overwrite=True to replace it, or choose another path")
