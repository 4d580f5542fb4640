"""Memory for intermediate results, which each thread uses again."""

from __future__ import annotations

import threading

import numpy as np

# Fresh memory costs a page fault for every 4 KiB: 5–10 % of the time to inflate. Above this size, it is not kept.
KEPT = 8 << 20

# Who uses which slot: 0 and 1 are results between filters, in turn.
RAW, INSIDE = 2, 3


class Scratch(threading.local):
    """Buffers of each thread, at most `KEPT` bytes for each slot that is used."""

    def __init__(self) -> None:
        self._buffers: dict[int, np.ndarray] = {}

    def take(self, slot: int, size: int) -> np.ndarray:
        """A buffer uint8 `(size,)` with any content; it is the one that was last taken for this slot."""
        if size > KEPT:
            return np.empty(size, np.uint8)
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[slot] = np.empty(size, np.uint8)
        return buffer[:size]


scratch = Scratch()
