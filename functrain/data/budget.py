"""A number of bytes that caches and streams share."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

from functrain.core.errors import ArgumentError
from functrain.core.explain import readable

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_of(name: str, given: int | str) -> int:
    """The argument `name` as a number of bytes: an int, or text such as "512 MiB"; `ArgumentError` for what is neither.

    >>> size_of("memory", "1.5 KiB"), size_of("memory", 7)
    (1536, 7)
    """
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", given) if isinstance(given, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ArgumentError(f'{name} takes a number of bytes above 0, as an int or as "512 MiB", got {given!r}')
    return int(float(match[1]) * unit)


class Budget:
    """Bytes that several holders share: a source's decoded chunks, the batches that `prefetch` has ready.

    Give the same budget to both, `memory=budget`, and together they hold at most `limit` bytes. What can be had again (decoded
    chunks) makes room for what cannot (batches). `used` is what is held now, `peak` the most that was.

    Raises `ArgumentError` for a limit that is no size.

    >>> budget = Budget("1 MiB")
    >>> budget.charge(300); budget.release(100); budget.used, budget.peak, budget.limit
    (200, 300, 1048576)
    """

    def __init__(self, limit: int | str) -> None:
        self.limit = size_of("limit", limit)
        self.used = self.peak = 0
        self._lock = threading.Lock()
        self._evictors: list[weakref.WeakMethod[Callable[[int], Any]]] = []

    @classmethod
    def of(cls, given: int | str | Budget) -> Budget:
        """A budget as it is, or a new one of that size."""
        return given if isinstance(given, Budget) else cls(size_of("memory", given))

    def charge(self, size: int) -> None:
        """Count `size` bytes that a holder has now; `room` first, to have others let go of theirs."""
        with self._lock:
            self.used += size
            self.peak = max(self.peak, self.used)

    def release(self, size: int) -> None:
        """Count `size` bytes less."""
        with self._lock:
            self.used -= size

    def room(self, size: int) -> bool:
        """Whether `size` more bytes fit, once caches have let go of what they can. Never waits."""
        for evictor in list(self._evictors):
            missing = self.used + size - self.limit
            if missing <= 0:
                break
            evict = evictor()
            if evict is not None:
                evict(missing)
        return self.used + size <= self.limit

    def on_pressure(self, evict: Callable[[int], Any]) -> None:
        """Have the bound method `evict(size)` called when others need room: it lets go of `size` bytes, or what it can.

        It is called without this budget's lock, from any thread, and calls `release`; it is forgotten with its object.
        """
        with self._lock:
            self._evictors = [known for known in self._evictors if known() is not None]
            self._evictors.append(weakref.WeakMethod(evict))

    def __repr__(self) -> str:
        return f"<Budget {readable(self.used)} of {readable(self.limit)}>"


__all__ = ["Budget", "size_of"]
