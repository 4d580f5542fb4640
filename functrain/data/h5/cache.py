"""Decoded chunks, kept in places of their own within a budget of bytes."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from functrain.data.budget import Account, Budget
from functrain.data.forks import renew
from functrain.data.h5.pool import Pool

Load = Callable[[int, np.ndarray], None]
Held = tuple[np.ndarray, list[int | None]]

# How long to wait, at a time, for a chunk that another thread is at: that thread may have been interrupted.
_PATIENCE = 0.2
# Below these sizes, of a place and of all, memory by the 2 MiB would be more than what is counted.
_LARGE_PLACE, _LARGE = 1 << 19, 1 << 26


class Cache:
    """The last chunks that were decoded, each in one of `slots` places of `size` bytes; `load(number, out)` decodes one.

    A chunk is decoded once, however many threads ask for it. A read that is interrupted (Ctrl-C) may leave anything behind:
    then all is forgotten, and the next one begins with empty places, as a forked process does.
    """

    def __init__(self, slots: int, size: int, budget: Budget, pool: Pool, load: Load) -> None:
        self.slots, self.size, self._budget, self._pool, self._load = slots, size, budget, pool, load
        self._places: _Places | None = None
        budget.on_pressure(self)
        renew(self)

    def after_fork(self) -> None:
        """In a forked process: what another thread of the parent process was at will never end in this one."""
        self._places = None

    def has(self, number: int) -> bool:
        """Whether a chunk is here, or on its way."""
        return self._places is not None and number in self._places.entries

    @contextmanager
    def holding(self, numbers: Sequence[int], spent: bool = False) -> Iterator[Held]:
        """The memory `(slots, size)`, and for each of these chunks (each once) its place in it, which stays meanwhile.

        None stands where no place was to be had: such a chunk is to be had `alone`. Those that are `spent` will not be wanted
        soon: their places are the next to be used. Raises what loading raised.
        """
        places = self._now()
        with self._whole(places), places.holding(numbers, self._budget.now(), spent, self) as held:
            yield places.bytes, held

    def copied(self, number: int, part: slice, out: np.ndarray, spent: bool = False) -> bool:
        """Copy these bytes of a chunk to `out`, if the chunk is here; whether it was. `spent` as in `holding`."""
        places = self._places
        if places is None:
            return False
        try:
            return places.copied(number, part, out, self._budget.now(), spent)
        except BaseException as problem:
            self._doubt(places, problem)
            raise

    def alone(self, number: int) -> np.ndarray:
        """A chunk `(size,)` in memory of its own, which nobody keeps."""
        alone = np.empty(self.size, np.uint8)
        self._load(number, alone)
        return alone

    def announce(self, numbers: Sequence[int], spare: bool = False) -> None:
        """Have these chunks decoded by the pool, into half of the places at most; if `spare`, where none makes way for them."""
        if self._pool.threads < 2:
            return
        places = self._now()
        missing = [number for number in numbers if number not in places.entries]
        if missing:
            with self._whole(places):
                places.announce(missing, self._budget.now(), self, spare)

    def oldest(self) -> int | None:
        """When the chunk that would go first was last used; the budget compares."""
        places = self._places
        return None if places is None else places.oldest()

    def evict(self, size: int) -> None:
        """Let go of chunks that nobody holds, `size` bytes of them or all; the budget calls this."""
        places = self._places
        if places is not None:
            with self._whole(places):
                places.evict(size)

    def _now(self) -> _Places:
        places = self._places
        if places is None:
            places = self._places = _Places(self.slots, self.size, Account(self._budget), self._load, self._pool)
        return places

    @contextmanager
    def _whole(self, places: _Places) -> Iterator[None]:
        try:
            yield
        except BaseException as problem:
            self._doubt(places, problem)
            raise

    def _doubt(self, places: _Places, problem: BaseException) -> None:
        """An interrupt may have come anywhere: begin anew."""
        if not isinstance(problem, Exception):
            if self._places is places:
                self._places = None
            places.abandon()


class _Entry:
    """A chunk that is there, or on its way."""

    __slots__ = ("ahead", "claimed", "coming", "failed", "pins", "slot", "used_at")

    def __init__(self, slot: int, ahead: bool, used_at: int) -> None:
        self.slot, self.ahead, self.used_at = slot, ahead, used_at
        self.pins, self.claimed = 0, False
        # Not the error itself: its traceback leads back here, and so to memory that would wait for a collection of garbage.
        self.failed = False
        # Held until the chunk is there. Let go of in one step, which an event is not: no interrupt comes in between.
        self.coming = threading.Lock()
        self.coming.acquire()

    @property
    def there(self) -> bool:
        return not self.coming.locked()


class _Places:
    """Memory for chunks, and which of them are in it.

    The places lie side by side, so that rows out of many chunks are gathered in one go, and decoding writes into memory that
    is there already. Pages that were never used, or were evicted, take no memory.
    """

    def __init__(self, slots: int, size: int, account: Account, load: Load, pool: Pool) -> None:
        self._slots, self._size, self._account, self._load, self._pool = slots, size, account, load, pool
        # Private, so that a forked process has its own; not reserved, as most of it may never be used.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, slots * size, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE") and size >= _LARGE_PLACE and slots * size >= _LARGE:
            # A first write to each 4 KiB cost as much as decoding fast codecs: 0.5 ms a MiB.
            with suppress(OSError):
                # A system may have been built without such pages.
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._memory, np.uint8).reshape(slots, size)
        self._lock = threading.Lock()
        self.entries: OrderedDict[int, _Entry] = OrderedDict()
        # Empty places: those that count against the budget, and those that do not yet, or no longer.
        self._empty: list[int] = []
        self._fresh = list(range(slots))[::-1]
        self._charged = np.zeros(slots, bool)
        self._ahead = 0
        self._abandoned = False

    def abandon(self) -> None:
        """Nothing here is to be relied upon any more; threads that wait find out."""
        self._abandoned = True
        self._account.settle()

    # --- taking ----------------------------------------------------------------------------------------------

    @contextmanager
    def holding(self, numbers: Sequence[int], now: int, spent: bool, asker: Cache) -> Iterator[list[int | None]]:
        self._begin(sum(number not in self.entries for number in numbers), asker)
        entries, mine = self._pin(numbers, now)
        try:
            self._work(mine)
            yield [None if entry is None else self._arrived(number, entry) for number, entry in zip(numbers, entries)]
        finally:
            with self._lock:
                for number, entry in zip(numbers, entries):
                    if entry is not None:
                        entry.pins -= 1
                        if spent:
                            self._drop(number, entry)

    def _drop(self, number: int, entry: _Entry) -> None:
        """Have the place of a chunk that nobody holds be the next to be used."""
        if entry.there and not entry.pins and self.entries.get(number) is entry:
            del self.entries[number]
            self._empty.append(entry.slot)

    def copied(self, number: int, part: slice, out: np.ndarray, now: int, spent: bool) -> bool:
        with self._lock:
            entry = self.entries.get(number)
            if entry is None or not entry.there or entry.failed:
                return False
            # Under the lock, in place of the three steps to hold a chunk: they take longer than to copy 100 KiB.
            out[:] = self.bytes[entry.slot, part]
            self._used(number, entry, now)
            if spent:
                self._drop(number, entry)
            return True

    def _used(self, number: int, entry: _Entry, now: int) -> None:
        self.entries.move_to_end(number)
        self._ahead -= entry.ahead
        entry.ahead, entry.used_at = False, now

    def _begin(self, wanted: int, asker: Cache, spare: bool = False) -> None:
        """Have empty places for `wanted` chunks, as far as the budget goes: if `spare`, as it is."""
        budget = self._account.budget
        while self._fresh and len(self._empty) < wanted:
            if spare and budget.used + self._size > budget.limit:
                break
            # One place there has to be.
            if not self._account.begin(self._size, len(self._fresh) == self._slots, asker):
                break
            with self._lock:
                slot = self._fresh.pop() if self._fresh else None
                if slot is not None:
                    self._charged[slot] = True
                    self._empty.append(slot)
            if slot is None:
                self._account.end(self._size)

    def _pin(self, numbers: Sequence[int], now: int) -> tuple[list[_Entry | None], list[tuple[int, _Entry]]]:
        mine = []
        with self._lock:
            # What is here first: it must not make way for what is not.
            found = [self.entries.get(number) for number in numbers]
            for number, entry in zip(numbers, found):
                if entry is not None:
                    self._used(number, entry, now)
                    entry.pins += 1
            for place, number in enumerate(numbers):
                if found[place] is None and (entry := self._place(number, now)) is not None:
                    entry.pins += 1
                    found[place] = entry
                    mine.append((number, entry))
        return found, mine

    def _place(self, number: int, now: int, ahead: bool = False, spare: bool = False) -> _Entry | None:
        """A new entry in an empty slot, or (not if `spare`) in that of the chunk that was not used for the longest time."""
        slot = self._empty.pop() if self._empty else None if spare else self._last(ahead)
        if slot is None:
            return None
        entry = self.entries[number] = _Entry(slot, ahead, now)
        self._ahead += ahead
        return entry

    def _last(self, ahead: bool = False) -> int | None:
        """The slot of the chunk that was not used for the longest time, which is dropped; None where all are in use."""
        for number, entry in self.entries.items():
            if not entry.pins and entry.there and not (ahead and entry.ahead):
                del self.entries[number]
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
            if entry.claimed or self._abandoned:
                return
            entry.claimed = True
        try:
            self._load(number, self.bytes[entry.slot])
        except BaseException as error:
            entry.failed = True
            with self._lock:
                if self.entries.get(number) is entry:
                    del self.entries[number]
                    self._ahead -= entry.ahead
                    self._empty.append(entry.slot)
            if not isinstance(error, Exception):
                raise
        finally:
            entry.coming.release()

    def _arrived(self, number: int, entry: _Entry) -> int | None:
        # What was announced may not have begun: then it is done here, and nobody waits for a thread that is busy elsewhere.
        self._fill(number, entry)
        while not entry.coming.acquire(timeout=_PATIENCE):
            if self._abandoned:
                return None
        entry.coming.release()
        return None if entry.failed else entry.slot

    # --- ahead -----------------------------------------------------------------------------------------------

    def announce(self, missing: Sequence[int], now: int, asker: Cache, spare: bool) -> None:
        self._begin(min(len(missing), self._slots // 2), asker, spare)
        for number in missing:
            with self._lock:
                if number in self.entries:
                    continue
                entry = self._place(number, now, True, spare) if self._ahead * 2 < self._slots else None
            if entry is None:
                return
            if not self._pool.submit(self._fill, number, entry):
                with self._lock:
                    # Nobody will load it: whoever waits for it does.
                    if not entry.pins and not entry.claimed and self.entries.get(number) is entry:
                        del self.entries[number]
                        self._ahead -= entry.ahead
                        self._empty.append(entry.slot)
                return

    # --- giving back -----------------------------------------------------------------------------------------

    def oldest(self) -> int | None:
        with self._lock:
            if self._empty:
                return 0
            return next((entry.used_at for entry in self.entries.values() if not entry.pins and entry.there), None)

    def evict(self, size: int) -> None:
        freed = 0
        with self._lock:
            while freed < size:
                slot = self._empty.pop() if self._empty else self._last()
                if slot is None:
                    break
                self._charged[slot] = False
                self._fresh.append(slot)
                self._give_back(slot)
                self._account.end(self._size)
                freed += self._size

    def _give_back(self, slot: int) -> None:
        """Let go of the pages of a place, but for those that a neighbour in use shares."""
        page = mmap.PAGESIZE
        first, last = slot * self._size // page, ((slot + 1) * self._size - 1) // page
        if self._charged[first * page // self._size : slot].any():
            first += 1
        if self._charged[slot + 1 : ((last + 1) * page - 1) // self._size + 1].any():
            last -= 1
        if first <= last:
            start, stop = first * page, min((last + 1) * page, self._slots * self._size)
            self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)
