"""Blocks of remote files, kept within a number of bytes: in memory, or in a folder that processes share."""

from __future__ import annotations

import os
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from functrain.core.errors import DataError

# A request to an object store takes about as long as 1 MiB of its answer.
BLOCK = 1 << 20
_RECENT = 8 * BLOCK


class Blocks(Protocol):
    """A cache of one file's blocks, by number; `get` and `put` may be called by many threads at once."""

    def get(self, number: int, size: int) -> bytes | None:
        """A block of `size` bytes; None where it is not kept."""
        ...

    def put(self, number: int, data: bytes) -> None:
        """Keep a block, and let go of those that were not used for the longest time."""
        ...


class MemoryBlocks:
    """Blocks in this process's memory, `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, size: int) -> bytes | None:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
            return self._blocks.get(number)

    def put(self, number: int, data: bytes) -> None:
        with self._lock:
            self._blocks.pop(number, None)
            self._blocks[number] = data
            # Added up, not kept: a count would be wrong for good after a Ctrl-C between two steps.
            held = sum(map(len, self._blocks.values()))
            while self._blocks and held > self.limit:
                held -= len(self._blocks.popitem(last=False)[1])


class FolderBlocks:
    """Blocks in a folder, `limit` bytes of them, those of other files included; processes may share it.

    A block is a file that is there whole or not at all, with a checksum behind it; `key` tells files, and their versions,
    apart. Nothing else in the folder is touched.
    """

    def __init__(self, folder: str, key: str, limit: int) -> None:
        self.folder, self.key, self.limit = Path(folder), key, limit
        # HDF5 asks for many small pieces of few blocks, each of which would be read, and summed up, whole.
        self._recent = MemoryBlocks(_RECENT)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._room(0)
        except OSError as error:
            raise DataError(f"the cache folder {folder!r} cannot be written to: {error}") from error

    def get(self, number: int, size: int) -> bytes | None:
        recent = self._recent.get(number, size)
        if recent is not None:
            return recent
        path = self._path(number)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        block, sum_ = data[:-4], data[-4:]
        if len(block) != size or zlib.crc32(block).to_bytes(4, "little") != sum_:
            path.unlink(missing_ok=True)
            return None
        # The time of its last use, by which blocks are let go of. Another process may have dropped it meanwhile.
        with suppress(OSError):
            os.utime(path)
        self._recent.put(number, block)
        return block

    def put(self, number: int, data: bytes) -> None:
        self._recent.put(number, data)
        path = self._path(number)
        part = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.part")
        whole = len(data) + 4
        if whole > self.limit:
            return
        # A full disk is no reason to end: what cannot be kept is fetched again.
        with suppress(OSError):
            try:
                # Counted before it is written: whoever is killed between the two leaves a count too high, which the next
                # look at the folder puts right.
                self._room(whole)
                part.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.key}-{number}.block"

    def _room(self, size: int) -> None:
        """Count `size` bytes more, which others make room for."""
        with self._total() as total:
            total[0] += size
            if total[0] > self.limit:
                total[0] = self._evict(self.limit - size) + size

    @contextmanager
    def _total(self) -> Iterator[list[int]]:
        """The bytes in the folder, to be changed: one process and thread at a time."""
        import fcntl

        with open(self.folder / "total", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            total = [int(text) if text.isdigit() else sum(size for _, size, _ in self._kept())]
            yield total
            file.truncate(0)
            file.write(str(total[0]).encode())

    def _kept(self) -> list[tuple[int, int, str]]:
        """When it was last used, size and path of each block, and of what killed processes left unfinished."""
        kept = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith((".block", ".part")):
                    with suppress(OSError):
                        about = entry.stat()
                        kept.append((about.st_mtime_ns, about.st_size, entry.path))
        return kept

    def _evict(self, limit: int) -> int:
        """Let go of the oldest blocks, down to an eighth below `limit`, as a look at the folder takes long; what is left."""
        kept = sorted(self._kept())
        left = sum(size for _, size, _ in kept)
        for _, size, path in kept:
            if left <= limit - limit // 8:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            left -= size
        return left
