"""A number of bytes that caches and streams share."""

from __future__ import annotations

import itertools
import operator
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol, SupportsIndex

from functrain.core.errors import ArgumentError
from functrain.core.explain import readable
from functrain.data.arguments import BOUND
from functrain.data.forks import renew

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_of(name: str, given: int | str) -> int:
    """The argument `name` as a number of bytes: an int, or text such as "512 MiB"; `ArgumentError` for what is neither.

    >>> size_of("memory", "1.5 KiB"), size_of("memory", 7)
    (1536, 7)
    """
    size = _bytes(given)
    if size is None or size < 1:
        raise ArgumentError(f'{name} takes a number of bytes above 0, as an int or as "512 MiB", got {given!r}')
    if size >= BOUND:
        raise ArgumentError(f"{name} takes a number of bytes below 2⁶³, got {given!r}")
    return size


def _bytes(given: object) -> int | None:
    if isinstance(given, str):
        # No size has more digits; Python refuses to read some thousands.
        match = re.fullmatch(r"\s*([0-9]{1,999}(?:\.[0-9]{1,999})?)\s*([a-zA-Z]*)\s*", given)
        unit = _UNITS.get(match[2].lower()) if match else None
        return None if match is None or unit is None else int(Fraction(match[1]) * unit)
    return None if isinstance(given, bool) or not isinstance(given, SupportsIndex) else operator.index(given)


class Evictable(Protocol):
    """What holds bytes that can be had again, and lets go of them when others need room."""

    def oldest(self) -> int | None:
        """The budget's `now()` when what would go first was last used; None where there is nothing to let go of."""
        ...

    def evict(self, size: int) -> None:
        """Let go of about `size` bytes, the oldest first, and give them back: from any thread, without the budget's lock."""
        ...


class Budget:
    """Bytes that several holders share: a source's decoded chunks, the batches that `prefetch` has ready.

    Give the same budget to both, `memory=budget`, and together they hold at most `limit` bytes. What can be had again (decoded
    chunks) makes room for what cannot (batches). `used` is what is held now, `peak` the most that was.

    Raises `ArgumentError` for a limit that is no size.

    >>> budget = Budget("1 MiB")
    >>> budget.used, budget.peak, budget.limit
    (0, 0, 1048576)
    """

    def __init__(self, limit: int | str) -> None:
        self.limit = size_of("limit", limit)
        self.used = self.peak = 0
        self._lock = threading.RLock()
        self._holders: list[weakref.ref[Evictable]] = []
        self._clock = itertools.count(1)
        renew(self)

    def after_fork(self) -> None:
        """In a forked process: its holders begin anew."""
        self._lock, self.used = threading.RLock(), 0

    @classmethod
    def of(cls, given: int | str | Budget) -> Budget:
        """A budget as it is, or a new one of that size."""
        return given if isinstance(given, Budget) else cls(size_of("memory", given))

    def room(self, size: int, asker: Evictable | None = None) -> bool:
        """Whether `size` more bytes fit, once holders have let go of what was not used for the longest time. Never waits.

        Where the oldest is the asker's own, it is told False and left to put its new bytes in the place of the old.
        """
        while (missing := self.used + size - self.limit) > 0:
            with self.lock():
                holders = [holder for known in self._holders if (holder := known()) is not None]
            aged = [(age, number) for number, holder in enumerate(holders) if (age := holder.oldest()) is not None]
            if not aged:
                break
            holder = holders[min(aged)[1]]
            before = self.used
            if holder is asker:
                break
            holder.evict(missing)
            if self.used >= before:
                # In use since, or another thread took the room.
                break
        return self.used + size <= self.limit

    def on_pressure(self, holder: Evictable) -> None:
        """Have `holder.evict(size)` called when others need room; it is forgotten with its object."""
        with self.lock():
            self._holders = [known for known in self._holders if known() is not None]
            self._holders.append(weakref.ref(holder))

    def now(self) -> int:
        """A number that grows from call to call."""
        return next(self._clock)

    def lock(self) -> threading.RLock:
        """What to hold while `used` changes."""
        # A holder that is forgotten releases its bytes wherever the interpreter happens to be: hence reentrant.
        return self._lock

    def __reduce__(self) -> tuple[type[Budget], tuple[int]]:
        # Another process has holders of its own.
        return Budget, (self.limit,)

    def __repr__(self) -> str:
        return f"<Budget {readable(self.used)} of {readable(self.limit)}>"


class Account:
    """What one stream holds of a budget: `items` of `held` bytes in all, which can be given back at any moment.

    Each count and its part in the budget change in one statement, in which no signal is handled: so Ctrl-C loses no bytes.
    What is forgotten is given back, and what was inherited through a fork is not this process's to give.

    >>> budget = Budget(100)
    >>> account = Account(budget)
    >>> account.begin(70), account.begin(70), account.begin(70, anyway=True), budget.used
    (True, False, True, 140)
    >>> account.settle(); budget.used
    0
    """

    # Of one whose making was interrupted: it has nothing to give back.
    _pid = -1

    def __init__(self, budget: Budget) -> None:
        self.budget, self.held, self.items = budget, 0, 0
        self._pid = os.getpid()

    def begin(self, size: int, anyway: bool = False, asker: Evictable | None = None) -> bool:
        """Charge one more item of `size` bytes, if there is room or `anyway`; whether it was charged."""
        budget = self.budget
        budget.room(size, asker)
        with budget.lock():
            begun = anyway or budget.used + size <= budget.limit
            if begun:
                self.items, self.held, budget.used = self.items + 1, self.held + size, budget.used + size
                budget.peak = max(budget.peak, budget.used)
        return begun

    def grow(self, size: int) -> None:
        """Charge `size` bytes more (or less, below 0) for an item that was begun."""
        budget = self.budget
        if size > 0:
            budget.room(size)
        with budget.lock():
            self.held, budget.used = self.held + size, budget.used + size
            budget.peak = max(budget.peak, budget.used)

    def end(self, size: int) -> None:
        """Release an item of `size` bytes; nothing where all were given back before."""
        budget = self.budget
        with budget.lock():
            if self.items:
                self.items, self.held, budget.used = self.items - 1, self.held - size, budget.used - size

    def settle(self) -> None:
        """Give everything back."""
        if self._pid == os.getpid():
            budget = self.budget
            with budget.lock():
                self.items, self.held, budget.used = 0, 0, budget.used - self.held

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the interpreter, what `settle` calls may be gone already.
        if not ending():
            self.settle()


__all__ = ["Account", "Budget", "Evictable", "size_of"]
