"""The bytes of a file behind a URL, fetched in blocks that are kept for a while."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from functrain.core.errors import ArgumentError, DataError
from functrain.data.budget import size_of
from functrain.data.h5.block_cache import BLOCK, Blocks, FolderBlocks, MemoryBlocks
from functrain.data.h5.fetch import Fetcher

# Blocks fetched at once, at most.
_REQUEST = 16
# How long to wait at a time, in seconds, for a block that another thread fetches: that thread may have been interrupted.
_PATIENCE = 0.2


class _Block:
    """A block on its way: `block` is None until it is there, and for good where it could not be fetched."""

    def __init__(self) -> None:
        self.block: bytes | None = None
        self._over, self._lock = False, threading.Lock()
        # A lock, let go of in one step: a future has several, and a Ctrl-C between two of them leaves others waiting.
        self._lock.acquire()

    def end(self) -> None:
        """It is there, or will not be."""
        if not self._over:
            self._over = True
            self._lock.release()

    def wait(self) -> None:
        """Until `end`."""
        while not self._over:
            if self._lock.acquire(timeout=_PATIENCE):
                self._lock.release()


Coming = dict[int, _Block]


class _Here:
    """What one process has of a remote file: a lock that another thread holds at a fork is never released in the child."""

    def __init__(self, fetcher: Fetcher, blocks: Blocks) -> None:
        self.fetcher, self.blocks = fetcher, blocks
        self.lock = threading.Lock()
        self.coming: Coming = {}


class RemoteBytes:
    """The bytes of the file at a URL, as `Bytes` has it: `read` may be called by many threads, and after a fork.

    `storage` holds the options of fsspec's file system, and of the cache: `cache`, a folder that outlives the process and
    that others may share (default: memory), and `cache_bytes`, its bound ("64 MiB" of memory, "8 GiB" of a folder). A cached
    block is of this version of the file: they are told apart by size and by what the file system says of it (ETag, time).

    Raises what `Fetcher` does: `DataError` that names URL and offset for a fetch that fails, and fails again when it is
    repeated, for a server that does not serve parts of files, and for a file that is replaced while it is open.

    >>> import fsspec
    >>> fsspec.filesystem("memory").pipe("/numbers", bytes(range(9)))
    >>> file = RemoteBytes("memory://numbers")
    >>> file.size(), file.read(3, 2)
    (9, b'\\x03\\x04')
    >>> file.close()
    """

    def __init__(self, url: str, storage: Mapping[str, Any] | None = None) -> None:
        options = dict(storage or {})
        folder, limit = options.pop("cache", None), options.pop("cache_bytes", None)
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise ArgumentError(f"storage's cache takes the path of a folder, or None for memory, got {folder!r}")
        if limit is None:
            limit = "64 MiB" if folder is None else "8 GiB"
        self.path, self._options = url, options
        self._folder = None if folder is None else os.fspath(folder)
        self._limit = size_of("storage's cache_bytes", limit)
        self._closed = False
        fetcher = Fetcher(url, options)
        self._version = fetcher.version()
        self._processes = {os.getpid(): self._of(fetcher)}

    def size(self) -> int:
        return self._version.size

    def read(self, offset: int, size: int) -> bytes:
        return self._read(offset, size, alone=False)

    def read_alone(self, offset: int, size: int) -> bytes:
        """Like `read`, waiting for no other thread: for the one that holds HDF5's lock."""
        return self._read(offset, size, alone=True)

    def close(self) -> None:
        self._closed = True
        here = self._processes.pop(os.getpid(), None)
        if here is not None:
            here.fetcher.close()

    # --- blocks ----------------------------------------------------------------------------------------------

    def _here(self) -> _Here:
        if self._closed:
            raise DataError(f"{self.path!r} was closed: open it again")
        pid = os.getpid()
        here = self._processes.get(pid)
        return here or self._processes.setdefault(pid, self._of(Fetcher(self.path, self._options)))

    def _of(self, fetcher: Fetcher) -> _Here:
        if self._folder is None:
            return _Here(fetcher, MemoryBlocks(self._limit))
        key = hashlib.sha256(json.dumps([self.path, self._version, BLOCK]).encode()).hexdigest()[:32]
        return _Here(fetcher, FolderBlocks(self._folder, key, self._limit))

    def _read(self, offset: int, size: int, alone: bool) -> bytes:
        if offset < 0 or size < 0 or offset + size > self._version.size:
            raise DataError(f"{self.path!r} ends at {self._version.size} bytes, before byte {offset + size}: it was cut short")
        if not size:
            return b""
        here = self._here()
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        pieces = []
        for start in range(first, last + 1, _REQUEST):
            for number, block in self._blocks(here, range(start, min(start + _REQUEST, last + 1)), alone):
                begin = number * BLOCK
                pieces.append(block[max(0, offset - begin) : offset + size - begin])
        return b"".join(pieces) if len(pieces) > 1 else pieces[0]

    def _blocks(self, here: _Here, numbers: range, alone: bool) -> list[tuple[int, bytes]]:
        blocks = {number: here.blocks.get(number, self._length(number)) for number in numbers}
        mine: Coming = {}
        try:
            theirs = self._claimed(here, [number for number, block in blocks.items() if block is None], alone, mine)
            for run in _runs(list(mine)):
                stop = min(run.stop * BLOCK, self._version.size)
                data = here.fetcher.fetched(run.start * BLOCK, stop, self._version, alone)
                for number in run:
                    block = data[(number - run.start) * BLOCK : (number - run.start + 1) * BLOCK]
                    here.blocks.put(number, block)
                    blocks[number] = mine[number].block = block
            self._unclaimed(here, mine)
        except BaseException:
            # Once more where an interrupt came in the middle of it: who waits for a block must not wait for ever.
            self._unclaimed(here, mine)
            raise
        for number, coming in theirs.items():
            coming.wait()
            # What went wrong for another thread, each finds out by itself.
            start, stop = number * BLOCK, number * BLOCK + self._length(number)
            blocks[number] = coming.block or here.fetcher.fetched(start, stop, self._version)
        return [(number, block or b"") for number, block in blocks.items()]

    def _claimed(self, here: _Here, missing: list[int], alone: bool, mine: Coming) -> Coming:
        """The blocks that another thread is fetching; the others are put into `mine`, for this one to fetch."""
        theirs: Coming = {}
        with here.lock:
            for number in missing:
                if number in here.coming and not alone:
                    theirs[number] = here.coming[number]
                else:
                    mine[number] = _Block()
                    here.coming.setdefault(number, mine[number])
        return theirs

    def _unclaimed(self, here: _Here, mine: Coming) -> None:
        with here.lock:
            for number, coming in mine.items():
                if here.coming.get(number) is coming:
                    del here.coming[number]
        for coming in mine.values():
            coming.end()

    def _length(self, number: int) -> int:
        return min(BLOCK, self._version.size - number * BLOCK)

class RemoteFile(io.RawIOBase):
    """A remote file as h5py takes one, which reads while it holds HDF5's lock."""

    def __init__(self, raw: RemoteBytes) -> None:
        self._raw, self._place = raw, 0

    def __repr__(self) -> str:
        # What h5py gives as the file's name.
        return self._raw.path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence, self._raw.size())
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._raw.size() - self._place))
        view[:size] = self._raw.read_alone(self._place, size)
        self._place += size
        return size


def _runs(numbers: list[int]) -> Iterator[range]:
    """Neighbouring numbers, in ascending order, as ranges.

    >>> list(_runs([3, 4, 7]))
    [range(3, 5), range(7, 8)]
    """
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place
