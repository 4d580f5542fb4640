"""Out of memory: how it is told from other errors, and what a gradient over parts does about it."""

from __future__ import annotations

import warnings

import torch

_TOLD = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on a device or on the host.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("a size is wrong"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TOLD)


def fewer(alive: int, what: str, error: BaseException) -> int:
    """Half as many parts alive at once, after a warning; the error itself when there is nothing left to halve."""
    if alive == 1:
        raise error
    half = (alive + 1) // 2
    advice = f"use workers={half}, more parts or a smaller batch to be rid of this warning"
    warnings.warn(f"out of memory with {alive} parts alive ({what}): {half} from now on; {advice}", RuntimeWarning, 4)
    return half
