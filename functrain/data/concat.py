"""Sources one after the other, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage
from functrain.data.gathered import Gathered
from functrain.data.runs import Runs
from functrain.data.source import Source

_SHOWN = 5


def concat(sources: Sequence[Source]) -> Source:
    """The elements of all sources, one source after the other.

    Elements at scattered positions are read with one `take` of each source. `.groups` `(n,)`, int64, is the number of the
    source that each element comes from, for `split(…, groups=source.groups)`. Raises `ArgumentError` for an empty list, for
    what is no source, and for sources without end or with deferred batches; `TreeError`, at the elements that show it, where
    sources disagree in structure, dtype or shape.

    >>> import functrain as ft, torch
    >>> both = ft.concat([ft.arrays(torch.arange(3)), ft.arrays(torch.arange(10, 12))])
    >>> both.shuffle(seed=0).length, [int(x) for x in both]
    (5, [0, 1, 2, 10, 11])
    """
    return Concat(members("concat", sources))


def members(purpose: str, sources: Any) -> list[Source]:
    """The sources of a list, each with an end, at least one."""
    listed = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else None
    if not listed:
        raise ArgumentError(f"{purpose} takes a list of at least one source, got {sources!r}")
    for place, source in enumerate(listed):
        if not isinstance(source, Source):
            raise ArgumentError(f"{purpose} takes sources, got {type(source).__name__} at place {place}: see functrain.arrays")
        source.undeferred(purpose).finite(purpose)
    return listed


class Concat(Gathered):
    """The elements of all sources, one source after the other; `bounds` says where each begins, and where the last ends."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.streams = self.inner = tuple(sources)
        self.bounds = np.concatenate([[0], np.cumsum([len(source) for source in sources])]).astype(np.int64)
        self.length = int(self.bounds[-1])

    def found(self, indices: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.searchsorted(self.bounds, indices, "right") - 1
        return numbers, indices - self.bounds[numbers]

    @property
    def groups(self) -> np.ndarray:
        """The number of the source of each element, `(n,)` int64."""
        return np.repeat(np.arange(len(self.inner)), np.diff(self.bounds))

    def runs(self) -> Runs | None:
        each = [source.runs() for source in self.inner]
        known = [runs for runs in each if runs is not None]
        if not known:
            return None
        stretches = [((len(source), 1),) if runs is None else runs.stretches for source, runs in zip(self.inner, each)]
        return Runs(tuple(stretch for part in stretches for stretch in part), max(runs.size for runs in known))

    def explain(self) -> Stage:
        if len(self.inner) <= _SHOWN:
            return super().explain()
        first, last = self.inner[: _SHOWN - 2], self.inner[-1]
        left_out = Stage(
            f"… {len(self.inner) - len(first) - 1:,} more", {"length": f"{self.bounds[-2] - self.bounds[len(first)]:,}"}
        )
        stages = [*(source.explain() for source in first), left_out, last.explain()]
        return Stage(type(self).__name__.lower(), self.facts(), stages)

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "sources": f"{len(self.inner):,}, of {spread(np.diff(self.bounds))} elements"}


def spread(sizes: np.ndarray) -> str:
    """The least and the largest of sizes, in words.

    >>> spread(np.array([3, 20, 5])), spread(np.array([4, 4]))
    ('3 … 20', '4')
    """
    least, most = int(sizes.min()), int(sizes.max())
    return f"{least:,}" if least == most else f"{least:,} … {most:,}"


__all__ = ["Concat", "concat", "members", "spread"]
