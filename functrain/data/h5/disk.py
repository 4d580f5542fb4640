"""The bytes of a new HDF5 file, as HDF5 sees them: writing them never fails."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from functrain.core.errors import DataError

# Copied at once: after each such piece, signals are let through and the system begins to write it to the disk.
_AT_ONCE = 1 << 23
# Stays in a processor's cache while bytes go through it.
_BUFFER = 1 << 18
# Where a contiguous dataset of at least this size begins: at a page of memory, so that maps of it are aligned.
PAGE = 4096
# A stand-in is known by its first bytes, drawn at random.
_MARK = 32
# Where the system cannot copy from file to file by itself: between kinds of file systems, and before Linux 4.5.
_CANNOT = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})


class Piece(NamedTuple):
    """Bytes that lie in another file, open as `descriptor`."""

    path: str
    descriptor: int
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; `DataError` where the file ends before."""
        data = os.pread(self.descriptor, self.size, self.offset)
        while len(data) < self.size:
            more = os.pread(self.descriptor, self.size - len(data), self.offset + len(data))
            if not more:
                raise self.ended()
            data += more
        return data

    def ended(self) -> DataError:
        """The error for a file that is shorter than it has to be."""
        end = self.offset + self.size
        return DataError(f"{self.path!r} is truncated: it ends before byte {end}, where its own index has data")


class Disk(io.RawIOBase):
    """The file, and bytes of other files that are to be copied into it.

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
        self._mark = os.urandom(_MARK)
        self._stand_in = memoryview(self._mark)
        self._expected: Piece | None = None
        # What is to be copied: a piece, how many bytes from its beginning on, and where to.
        self._copies: list[tuple[Piece, int, int]] = []
        self._to_copy = 0
        self._buffer: memoryview | None = None

    def check(self) -> None:
        """Copy what is to be copied, and raise the first failure, if there was one."""
        if self._failure is None:
            copies, self._copies, self._to_copy = self._copies, [], 0
            try:
                for piece, size, place in copies:
                    self._copy(piece._replace(size=size), place)
            except DataError:
                raise
            except OSError as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure

    # --- bytes of other files --------------------------------------------------------------------------------

    def expect(self, piece: Piece) -> memoryview | None:
        """A stand-in for `piece` to give to HDF5, which will say where it belongs; None for one that is too small.

        So the bytes themselves do not go through HDF5 and Python, and neighbours are copied together.
        """
        if piece.size < _MARK:
            return None
        if piece.size > len(self._stand_in):
            # Zeros that nobody reads take no memory.
            self._stand_in = memoryview(bytearray(2 * piece.size))
            self._stand_in[:_MARK] = self._mark
        self._expected = piece
        return self._stand_in[: piece.size]

    def met(self) -> bool:
        """Whether HDF5 has written the stand-in since it was given, in one go."""
        missed, self._expected = self._expected, None
        return missed is None

    @property
    def full(self) -> bool:
        """Whether so much is to be copied that it is time for `check`."""
        return self._to_copy >= _AT_ONCE

    def copy(self, piece: Piece, place: int) -> None:
        """Have `piece` copied to `place` in this file at the next `check`."""
        self._to_copy += piece.size
        if self._copies:
            first, size, where = self._copies[-1]
            if (first.descriptor, first.offset + size, where + size) == (piece.descriptor, piece.offset, place):
                self._copies[-1] = first, size + piece.size, where
                return
        self._copies.append((piece, piece.size, place))

    def _copy(self, piece: Piece, place: int) -> None:
        offset, left, target = piece.offset, piece.size, self._file.fileno()
        buffer = self._buffer = self._buffer or memoryview(bytearray(_BUFFER))
        while left:
            copied = _transfer(piece.descriptor, offset, target, place, min(left, _AT_ONCE), buffer)
            if not copied:
                raise piece.ended()
            _begin_writing(target, place, copied)
            offset, place, left = offset + copied, place + copied, left - copied

    # --- what HDF5 calls -------------------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            offset += self._place if whence == os.SEEK_CUR else self._size()
        self._place = offset
        return offset

    def tell(self) -> int:
        return self._place

    def _size(self) -> int:
        kept = max((start + len(data) for start, data in self._unwritten), default=0)
        return max(kept, os.fstat(self._file.fileno()).st_size)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size, start = len(view), self._place
        self._place = start + size
        expected = self._expected
        if expected is not None and size == expected.size and bytes(view[:_MARK]) == self._mark:
            self._expected = None
            self.copy(expected, start)
            return size
        if self._failure is None:
            try:
                self._write(start, view)
            except OSError as error:
                self._failure = error
        if self._failure is not None:
            self._unwritten.append((start, bytes(view)))
        return size

    def _write(self, start: int, view: memoryview) -> None:
        descriptor = self._file.fileno()
        while len(view):
            # The system takes at most 2 GiB at once, and up to a limit what fits below it.
            written = os.pwrite(descriptor, view, start)
            start, view = start + written, view[written:]

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


def _transfer(source: int, offset: int, target: int, place: int, size: int, buffer: memoryview) -> int:
    """Copy up to `size` bytes from file to file: how many were; 0 at the end of the source."""
    # Inside the system where pages fit onto pages. Where they do not, that took 1.5 times as long, and through a
    # buffer 1.1 times.
    if hasattr(os, "copy_file_range") and not (offset - place) % PAGE:
        try:
            copied = os.copy_file_range(source, target, size, offset, place)
            if copied:
                return copied
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    done = 0
    while done < size:
        # Up to the end of a page, so that the next begins at one.
        read = os.preadv(source, [buffer[: min(size - done, len(buffer) - place % PAGE)]], offset + done)
        if not read:
            break
        view = buffer[:read]
        while len(view):
            written = os.pwrite(target, view, place)
            place, done, view = place + written, done + written, view[written:]
    return done


def _begin_writing(descriptor: int, place: int, size: int) -> None:
    """Have the system begin to write these bytes to the disk, so that there is less to wait for in the end."""
    # What is being written is not dropped from memory. 84 MB, then fsync: 109 ms without, 77 ms with this.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place, size, os.POSIX_FADV_DONTNEED)


__all__ = ["PAGE", "Disk", "Piece"]
