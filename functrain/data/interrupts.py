"""Signals that wait while a library in C calls back into Python, and must not see an exception there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Python's signal handlers wait until the function that this gives is called, or until the block ends.

    So a Ctrl-C raises where the block allows it, and nowhere else. Outside the main thread there is nothing to
    hold: Python runs handlers in that one only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    waiting: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    former = {int(number): handler for number, handler in handlers.items() if callable(handler)}

    def deliver() -> None:
        while waiting:
            number, frame = waiting.pop(0)
            former[number](number, frame)

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        for number in former:
            signal.signal(number, lambda number, frame: waiting.append((number, frame)))
        yield deliver
    finally:
        try:
            restore()
        except BaseException:
            # A handler that was restored already may raise before the last one is.
            restore()
            raise
        deliver()
