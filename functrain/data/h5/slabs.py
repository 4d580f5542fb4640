"""Cutting an array into blocks of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator


def slabs(
    shape: tuple[int, ...], itemsize: int, memory: int, chunks: tuple[int, ...] | None = None
) -> Iterator[tuple[slice, ...]]:
    """Blocks that cover an array and hold at most `memory` bytes each (or one element), whole chunks where they fit.

    >>> list(slabs((5, 2), itemsize=4, memory=16))
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 4, None), slice(0, 2, None)), (slice(4, 5, None), slice(0, 2, None))]
    """
    steps = []
    budget = max(1, memory // itemsize)
    for place in range(len(shape)):
        behind = max(1, math.prod(shape[place + 1 :]))
        step = min(shape[place], max(1, budget // behind)) or 1
        if chunks is not None and chunks[place] <= step < shape[place]:
            step -= step % chunks[place]
        steps.append(step)
        budget = max(1, budget // step)
    yield from _blocks(shape, tuple(steps))


def _blocks(shape: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    # One by one, where itertools.product makes lists first: a damaged shape may ask for 2⁴⁰ of them.
    if not shape:
        yield ()
        return
    for start in range(0, shape[0], steps[0]):
        for behind in _blocks(shape[1:], steps[1:]):
            yield slice(start, min(start + steps[0], shape[0])), *behind
