"""When a load may begin: at most so many elements, and so many bytes, are under way."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from queue import Empty, SimpleQueue
from time import perf_counter

from functrain.data.budget import Account
from functrain.data.waits import Clock


class Turns:
    """Numbers 0, 1, 2 … for loaders to load, each given out once its load may begin; at most `depth` are out.

    `free` holds a token for each load that may begin: True, put back when an element is taken; False ends all loading.
    """

    def __init__(self, depth: int) -> None:
        self.free: SimpleQueue[bool | None] = SimpleQueue()
        # A flag, and no event: a Ctrl-C in the middle of setting one leaves its lock held.
        self.closing = False
        self._numbers = itertools.count()
        for _ in range(depth):
            self.free.put(True)

    def next(self, clock: Clock) -> int | None:
        """The next number, as soon as its load may begin; None where no load should begin any more."""
        try:
            token = self.free.get_nowait()
        except Empty:
            token = self._waited(clock)
        if token and not self.closing:
            return next(self._numbers)
        self.stop()
        return None

    def stop(self) -> None:
        """No load begins from now on; loaders that wait are woken, each by the one before."""
        self.closing = True
        self.free.put(False)

    def _waited(self, clock: Clock) -> bool:
        waited, since = clock.pause[0], perf_counter()
        clock.pause = (waited, since)
        while (token := self._woken()) is None:
            pass
        clock.pause = (waited + perf_counter() - since, 0.0)
        return token

    def _woken(self) -> bool | None:
        """The next token; None where none came for a while."""
        try:
            return self.free.get(timeout=0.2)
        except Empty:
            # A program that ends inside its `with` block must not wait for a thread that nobody will wake.
            return None if threading.main_thread().is_alive() else False


class PlannedTurns(Turns):
    """Turns that are planned as far ahead as `depth`, and `account`'s budget, allow; `fresh` gives them, when `telling`.

    Each plan charges the account with what the last element took, which `loaded` puts right. One element may always be
    under way, however large. From number `count` on there is nothing to load, so nothing to charge or to tell of.
    """

    def __init__(self, depth: int, count: int | None, account: Account | None, telling: bool = False) -> None:
        super().__init__(depth)
        self.account, self._count, self._last = account, count, 0 if account is None else None
        self._telling = telling
        self._lock = threading.Lock()
        self._tokens = self._planned = 0
        self._todo: deque[int] = deque()
        self._fresh: deque[int] = deque()
        self._charged: dict[int, int] = {}

    def next(self, clock: Clock) -> int | None:
        waited, since = clock.pause[0], perf_counter()
        clock.pause = (waited, since)
        with self._lock:
            number = self._following()
        clock.pause = (waited + perf_counter() - since, 0.0)
        if number is None:
            self.stop()
        return number

    def _following(self) -> int | None:
        going = True
        while going and not self.closing:
            going = self._collect()
            self._plan()
            if self._todo:
                return self._todo.popleft()
            going = going and self._add(self._woken())
        return None

    def fresh(self) -> list[int]:
        """The numbers that were planned since the last call."""
        numbers = []
        try:
            while True:
                numbers.append(self._fresh.popleft())
        except IndexError:
            return numbers

    def loaded(self, number: int, size: int) -> None:
        """An element is loaded, and takes `size` bytes."""
        if self.account is not None:
            charged = self._charged.pop(number)
            if size != charged:
                self.account.grow(size - charged)
            unknown, self._last = self._last is None, size
            if unknown or size < charged:
                # There is more room than a loader knows that waits for some.
                self.free.put(None)

    def _collect(self) -> bool:
        while not self.free.empty():
            if not self._add(self.free.get()):
                return False
        return True

    def _add(self, token: bool | None) -> bool:
        self._tokens += token is True
        return token is not False

    def _plan(self) -> None:
        while self._tokens and (self._ended() or self._charge()):
            self._todo.append(self._planned)
            if self._telling and not self._ended():
                self._fresh.append(self._planned)
            self._planned += 1
            self._tokens -= 1

    def _ended(self) -> bool:
        return self._count is not None and self._planned >= self._count

    def _charge(self) -> bool:
        """Charge the account with the next element; False while it has no room, and others are under way."""
        account = self.account
        if account is None:
            return True
        alone = not account.items
        # How large elements are is not known before the first is there: until then, one at a time.
        if not alone and (self._last is None or not account.begin(self._last)):
            return False
        if alone:
            account.begin(self._last or 0, anyway=True)
        self._charged[self._planned] = self._last or 0
        return True


__all__ = ["PlannedTurns", "Turns"]
