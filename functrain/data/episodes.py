"""Episodes of different lengths: whole, as windows that stay inside one, or step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.arguments import integer
from functrain.data.concat import Concat, members, spread
from functrain.data.source import Source
from functrain.data.stacking import stacked
from functrain.data.windows import Windows


def episodes(sources: Sequence[Source] | Source) -> Episodes:
    """A source whose element i is the whole of episode i, its steps stacked to `(T_i, …)`.

    `sources` holds one source of steps for each episode: a list, or what `hdf5` and `concat` give for several files or groups.

    - `.lengths` `(E,)`, int64: T_i.
    - `.windows(size, stride)`: sequences `(size, …)` that never cross from one episode into the next.
    - `.steps()`: the steps of all episodes, one after the other.
    - `.padded(size)`: batches of whole episodes.

    Raises `ArgumentError` for an empty list, a single source of steps, and episodes without steps or without end.

    >>> import functrain as ft, torch
    >>> both = ft.episodes([ft.arrays(torch.arange(3)), ft.arrays(torch.arange(10, 14))])
    >>> both.lengths.tolist(), both(0), [w.tolist() for w in both.windows(2)]
    ([3, 4], tensor([0, 1, 2]), [[0, 1], [10, 11], [12, 13]])
    """
    if isinstance(sources, Source) and not isinstance(sources, Concat):
        raise ArgumentError("episodes takes a list of sources, one for each episode, or a source over several files or groups")
    joined = sources if isinstance(sources, Concat) else Concat(members("episodes", sources))
    empty = np.flatnonzero(np.diff(joined.bounds) == 0)
    if len(empty):
        raise ArgumentError(f"episode {empty[0]} has no steps: leave it out")
    return Episodes(joined)


class Episodes(Source):
    """Whole episodes."""

    ragged = True

    def __init__(self, joined: Concat) -> None:
        self.joined, self.inner = joined, (joined,)
        self.lengths = np.diff(joined.bounds)
        self.length = len(joined.inner)

    def get(self, i: int, epoch: int) -> Tree:
        return self.joined.inner[i].take(np.arange(self.lengths[i]), epoch)

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return stacked(self.elements(indices, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        for i in indices.tolist():
            self.joined.inner[i].announce(np.arange(self.lengths[i]), epoch)

    def windows(self, size: int, stride: int | None = None) -> Source:
        """Sequences of `size` steps of one episode, one every `stride` (default: `size`): `(size, …)`.

        They begin anew in each episode; its last steps that fill no window are dropped, and shorter episodes whole. Raises
        `ArgumentError` where no episode has `size` steps.

        >>> import functrain as ft, torch
        >>> both = ft.episodes([ft.arrays(torch.arange(3)), ft.arrays(torch.arange(10, 14))])
        >>> [w.tolist() for w in both.windows(3, stride=1)]
        [[0, 1, 2], [10, 11, 12], [11, 12, 13]]
        """
        size = integer("size", size, 1)
        return EpisodeWindows(self.joined, size, size if stride is None else integer("stride", stride, 1))

    def steps(self) -> Source:
        """The steps of all episodes, one after the other.

        >>> import functrain as ft, torch
        >>> both = ft.episodes([ft.arrays(torch.arange(3)), ft.arrays(torch.arange(10, 12))])
        >>> [int(x) for x in both.steps()]
        [0, 1, 2, 10, 11]
        """
        return self.joined

    def facts(self) -> dict[str, str]:
        return {"episodes": f"{self.length:,} of {spread(self.lengths)} steps"}


class EpisodeWindows(Windows):
    """Windows that begin anew in each episode."""

    def __init__(self, joined: Concat, size: int, stride: int) -> None:
        self.source, self.inner, self.size, self.stride = joined, (joined,), size, stride
        lengths = np.diff(joined.bounds)
        counts = np.maximum(0, (lengths - size) // stride + 1)
        if not counts.any():
            raise ArgumentError(f"windows of {size} do not fit into any episode: the longest has {lengths.max()} steps")
        self._begins = joined.bounds[:-1]
        # Where each episode's windows begin among all.
        self._counts, self._firsts = counts, np.cumsum(counts) - counts
        self.length = int(counts.sum())
        self.short = int((counts == 0).sum())
        # Where windows lie apart, what is between them is left out too.
        covered = np.where(counts > 0, size + (counts - 1) * min(size, stride), 0)
        self.rest = int((lengths - covered).sum())

    def starts(self, indices: np.ndarray) -> np.ndarray:
        # The last episode whose first window is not behind: episodes without windows share that place with the next.
        numbers = np.searchsorted(self._firsts, indices, "right") - 1
        return self._begins[numbers] + (indices - self._firsts[numbers]) * self.stride

    def before(self, steps: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(self._begins, steps, "left") - 1
        here = -(-(steps - self._begins[numbers]) // self.stride)
        return self._firsts[numbers] + np.minimum(here, self._counts[numbers])

    def facts(self) -> dict[str, str]:
        windows = f"{self.length:,} of {self.size} steps of one episode, one every {self.stride}"
        left = f"{self.rest:,} steps" + (f", all of {self.short:,} episodes that are too short" if self.short else "")
        return {"windows": windows, "left over": left}


__all__ = ["Episodes", "episodes"]
