"""Signals that wait while a library in C calls back into Python, and must not see an exception there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Held:
    """Python's signal handlers, which wait until they are let through."""

    def __init__(self, former: dict[int, Callable[[int, FrameType | None], object]]) -> None:
        self._former = former
        self._waiting: list[tuple[int, FrameType | None]] = []
        self._open = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """A signal came: run its handler if the block allows it now, and keep it for later otherwise."""
        self._waiting.append((number, frame))
        if self._open:
            # Closed first: a handler that raises leaves the open block, wherever in it that is.
            self._open = False
            self.deliver()
            self._open = True

    def deliver(self) -> None:
        """Run the handlers of the signals that came; one that raises does so here."""
        while self._waiting:
            number, frame = self._waiting.pop(0)
            self._former[number](number, frame)

    @contextmanager
    def released(self) -> Iterator[None]:
        """A block that signals reach at once, as if nothing were held."""
        self.deliver()
        self._open = True
        try:
            yield
        finally:
            self._open = False


@contextmanager
def held_signals() -> Iterator[Held]:
    """Python's signal handlers wait until `deliver` of what this gives is called, or until the block ends.

    So a Ctrl-C raises where the block allows it, and nowhere else. Outside the main thread there is nothing to
    hold: Python runs handlers in that one only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Held({})
        return
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    former = {int(number): handler for number, handler in handlers.items() if callable(handler)}
    held = Held(former)

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        for number in former:
            signal.signal(number, held.take)
        yield held
    finally:
        try:
            restore()
        except BaseException:
            # A handler that was restored already may raise before the last one is.
            restore()
            raise
        held.deliver()
