"""Decoded chunks, kept in places of their own within a budget of bytes."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from functrain.data.budget import Budget
from functrain.data.h5.pool import Pool

Load = Callable[[int, np.ndarray], None]


class _Entry:
    """A chunk that is there, or on its way."""

    __slots__ = ("ahead", "claimed", "done", "error", "pins", "slot", "used_at")

    def __init__(self, slot: int, ahead: bool, used_at: int) -> None:
        self.slot, self.ahead, self.used_at = slot, ahead, used_at
        self.pins, self.claimed = 0, False
        self.done = threading.Event()
        self.error: BaseException | None = None


class Cache:
    """The last chunks that were decoded, each in one of `slots` places of `size` bytes.

    The places lie side by side in one piece of memory, so that rows out of many chunks are gathered in one go, and
    decoding writes into memory that is there already. Pages of it that were never used, or were evicted, take no memory.
    A chunk is decoded once, however many threads ask for it; those that hold pins stay.
    """

    def __init__(self, slots: int, size: int, budget: Budget, pool: Pool, load: Load) -> None:
        self.slots, self.size, self._budget, self._pool, self._load = slots, size, budget, pool, load
        # Private, so that a forked process has its own; not reserved, as most of it may never be used.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, slots * size, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A first write to each 4 KiB cost as much as decoding fast codecs: 0.5 ms a MiB.
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._memory, np.uint8).reshape(slots, size)
        self._reset()
        budget.on_pressure(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        # Empty places: those that count against the budget, and those that do not yet, or no longer.
        self._empty: list[int] = []
        self._fresh = list(range(self.slots))[::-1]
        self._ahead = 0

    def __del__(self) -> None:
        if hasattr(self, "_fresh") and self._pid == os.getpid():
            self._budget.release((self.slots - len(self._fresh)) * self.size)

    # --- taking ----------------------------------------------------------------------------------------------

    def has(self, number: int) -> bool:
        """Whether a chunk is here, or on its way."""
        return number in self._entries

    @contextmanager
    def holding(self, numbers: Sequence[int], spent: bool = False) -> Iterator[list[int | np.ndarray]]:
        """For each of these chunks (each once) its slot, or, where no place was to be had, its bytes `(size,)`.

        Those that are `spent` will not be wanted soon: their places are the next to be used. Raises what loading raised.
        """
        self._begin(sum(number not in self._entries for number in numbers))
        entries, mine = self._pin(numbers)
        try:
            self._work(mine)
            yield [self._alone(n) if entry is None else self._arrived(n, entry) for n, entry in zip(numbers, entries)]
        finally:
            with self._lock:
                for entry in entries:
                    if entry is not None:
                        entry.pins -= 1
                for number, entry in zip(numbers, entries):
                    if spent and entry is not None and not entry.pins and self._entries.get(number) is entry:
                        del self._entries[number]
                        self._empty.append(entry.slot)

    def _begin(self, wanted: int) -> None:
        """Have empty places for `wanted` chunks, as far as the budget goes."""
        if self._pid != os.getpid():
            # What another thread of the parent process was at will never end in this one.
            self._reset()
        while self._fresh and len(self._empty) < wanted:
            if len(self._fresh) == self.slots and not self._budget.room(self.size, self):
                # One place there has to be.
                self._budget.charge(self.size)
            elif not self._budget.reserve(self.size, self):
                break
            with self._lock:
                if self._fresh:
                    self._empty.append(self._fresh.pop())
                else:
                    self._budget.release(self.size)

    def _pin(self, numbers: Sequence[int]) -> tuple[list[_Entry | None], list[tuple[int, _Entry]]]:
        entries: list[_Entry | None] = []
        mine = []
        now = self._budget.now()
        with self._lock:
            for number in numbers:
                entry = self._entries.get(number)
                if entry is None:
                    entry = self._place(number, now)
                    if entry is not None:
                        mine.append((number, entry))
                else:
                    self._entries.move_to_end(number)
                    self._ahead -= entry.ahead
                    entry.ahead, entry.used_at = False, now
                if entry is not None:
                    entry.pins += 1
                entries.append(entry)
        return entries, mine

    def _place(self, number: int, now: int, ahead: bool = False) -> _Entry | None:
        """A new entry in an empty slot, or in that of the chunk that was not used for the longest time."""
        slot = self._empty.pop() if self._empty else self._oldest(ahead)
        if slot is None:
            return None
        entry = self._entries[number] = _Entry(slot, ahead, now)
        self._ahead += ahead
        return entry

    def _oldest(self, ahead: bool = False) -> int | None:
        """The slot of the chunk that was not used for the longest time, which is dropped; None where all are in use."""
        for number, entry in self._entries.items():
            if not entry.pins and entry.done.is_set() and not (ahead and entry.ahead):
                del self._entries[number]
                self._ahead -= entry.ahead
                return entry.slot
        return None

    def _work(self, mine: list[tuple[int, _Entry]]) -> None:
        """Load these chunks, with the help of the pool."""
        for number, entry in mine[1:]:
            if not self._pool.submit(self._fill, number, entry):
                break
        for number, entry in mine:
            self._fill(number, entry)

    def _fill(self, number: int, entry: _Entry) -> None:
        """Load a chunk, unless somebody is at it already."""
        with self._lock:
            if entry.claimed:
                return
            entry.claimed = True
        try:
            self._load(number, self.bytes[entry.slot])
        except BaseException as error:
            entry.error = error
            with self._lock:
                if self._entries.get(number) is entry:
                    del self._entries[number]
                    self._ahead -= entry.ahead
                    self._empty.append(entry.slot)
            if not isinstance(error, Exception):
                raise
        finally:
            entry.done.set()

    def _arrived(self, number: int, entry: _Entry) -> int | np.ndarray:
        # What was announced may not have begun: then it is done here, and nobody waits for a thread that is busy elsewhere.
        self._fill(number, entry)
        entry.done.wait()
        return entry.slot if entry.error is None else self._alone(number)

    def _alone(self, number: int) -> np.ndarray:
        """A chunk in memory of its own, which nobody keeps."""
        alone = np.empty(self.size, np.uint8)
        self._load(number, alone)
        return alone

    # --- ahead -----------------------------------------------------------------------------------------------

    def announce(self, numbers: Sequence[int]) -> None:
        """Have these chunks decoded by the pool, into half of the places at most: what is in use now is not driven out."""
        if self._pool.threads < 2:
            return
        missing = [number for number in numbers if number not in self._entries]
        if not missing:
            return
        self._begin(len(missing))
        now = self._budget.now()
        for number in missing:
            with self._lock:
                if number in self._entries:
                    continue
                entry = self._place(number, now, ahead=True) if self._ahead * 2 < self.slots else None
            if entry is None or not self._pool.submit(self._fill, number, entry):
                if entry is not None:
                    self._drop(number, entry)
                return

    def _drop(self, number: int, entry: _Entry) -> None:
        """Nobody will load this chunk ahead: whoever waits for it does."""
        with self._lock:
            if not entry.pins and not entry.claimed and self._entries.get(number) is entry:
                del self._entries[number]
                self._ahead -= entry.ahead
                self._empty.append(entry.slot)

    # --- giving back -----------------------------------------------------------------------------------------

    def oldest(self) -> int | None:
        """When the chunk that would go first was last used; the budget compares."""
        with self._lock:
            if self._empty:
                return 0
            return next((entry.used_at for entry in self._entries.values() if not entry.pins and entry.done.is_set()), None)

    def evict(self, size: int) -> None:
        """Let go of chunks that nobody holds, `size` bytes of them or all; the budget calls this."""
        freed = 0
        with self._lock:
            while freed < size:
                slot = self._empty.pop() if self._empty else self._oldest()
                if slot is None:
                    break
                first = -(-slot * self.size // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (slot + 1) * self.size // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
                self._fresh.append(slot)
                freed += self.size
        self._budget.release(freed)
