"""Episodes of different lengths: whole, as windows that stay inside one, or step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.arguments import integer
from functrain.data.concat import Concat, members, spread
from functrain.data.order import Epoch, Reordered
from functrain.data.ragged import Ragged
from functrain.data.runs import Runs
from functrain.data.source import Source
from functrain.data.stacking import stacked
from functrain.data.windows import Windows


def episodes(sources: Sequence[Source] | Source) -> Episodes:
    """A source whose element i is the whole of episode i, its steps stacked to `(T_i, …)`.

    `sources` holds one source of steps for each episode: a list, or what `hdf5` and `concat` give for several files or groups.
    Or it is a source of whole sequences already: what `ragged` gives, or a part of such or of episodes (`.split`, `.shard`).

    - `.lengths` `(E,)`, int64: T_i.
    - `.windows(size, stride)`: sequences `(size, …)` that never cross from one episode into the next; their `.groups`
      `(W,)` are the numbers of their episodes, so that `windows.split(…, groups=windows.groups)` keeps episodes whole.
    - `.steps()`: the steps of all episodes, one after the other.
    - `.padded(size)`: batches of whole episodes.

    Raises `ArgumentError` for an empty list, a single source of steps, episodes without steps or without end, and those whose
    order changes with the epoch: shuffle the windows.

    >>> import functrain as ft, torch
    >>> both = ft.episodes([ft.arrays(torch.arange(3)), ft.arrays(torch.arange(10, 14))])
    >>> both.lengths.tolist(), both(0), [w.tolist() for w in both.windows(2)]
    ([3, 4], tensor([0, 1, 2]), [[0, 1], [10, 11], [12, 13]])
    >>> train, test = both.split(0.5)
    >>> [w.tolist() for w in ft.episodes(test).windows(2)]
    [[10, 11], [12, 13]]
    """
    if isinstance(sources, Concat):
        joined: Concat | Stretches = sources
    elif isinstance(sources, Source):
        joined = _of_sequences(sources)
    else:
        joined = Concat(members("episodes", sources))
    if any(isinstance(_behind(source), (Episodes, Ragged)) for source in joined.inner):
        raise ArgumentError("episodes takes a source of steps for each episode, and some of these have whole sequences already")
    empty = np.flatnonzero(np.diff(joined.bounds) == 0)
    if len(empty):
        raise ArgumentError(f"episode {empty[0]} has no steps: leave it out")
    return Episodes(joined)


def _of_sequences(source: Source) -> Concat | Stretches:
    """The steps of the sequences that are the elements of a source."""
    base = _behind(source)
    if not isinstance(base, (Episodes, Ragged)):
        raise ArgumentError(
            "episodes takes a list of sources, one for each episode, a source over several files or groups, or one of whole "
            "sequences (functrain.ragged, parts of episodes), with .map and .padded after .windows"
        )
    if not source.steady:
        raise ArgumentError(
            "the order of these episodes changes with the epoch: shuffle the windows, episodes.windows(…).shuffle(seed), or "
            "take one order, episodes(source.epoch(0))"
        )
    order, epoch = np.arange(len(source)), 0
    while source is not base:
        if isinstance(source, Epoch):
            epoch = source.number
        else:
            assert isinstance(source, Reordered)
            order = source.indices(order, epoch)
        source = source.source
    if isinstance(base, Ragged):
        return Stretches(_steady(base.values, epoch), base.offsets[order], base.lengths[order])
    joined = base.joined
    if isinstance(joined, Stretches):
        return Stretches(_steady(joined.source, epoch), joined.starts[order], base.lengths[order])
    return Concat([_steady(joined.inner[i], epoch) for i in order.tolist()])


def _behind(source: Source) -> Source:
    """What a source takes its elements from, in whatever order."""
    while isinstance(source, (Reordered, Epoch)):
        source = source.source
    return source


def _steady(source: Source, epoch: int) -> Source:
    return source if source.steady else source.epoch(epoch)


class Stretches(Reordered):
    """Stretches of one source, one after the other; `bounds` says where each begins, and where the last ends."""

    def __init__(self, source: Source, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        super().__init__(source, int(self.bounds[-1]))
        self.starts = starts

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        numbers = np.searchsorted(self.bounds, positions, "right") - 1
        return self.starts[numbers] + positions - self.bounds[numbers]

    def runs(self) -> Runs | None:
        whole, first = self.source.runs(), int(self.starts[0])
        # In another order, or with gaps, neighbours here are none there.
        contiguous = (self.starts - first == self.bounds[:-1]).all()
        return whole.between(first, first + len(self)) if whole is not None and contiguous else None


class Episodes(Source):
    """Whole episodes."""

    ragged = True
    sequences = True

    def __init__(self, joined: Concat | Stretches) -> None:
        self.joined, self.inner = joined, (joined,)
        self.lengths = np.diff(joined.bounds)
        self.length = len(self.lengths)

    def get(self, i: int, epoch: int) -> Tree:
        return self.joined.take(self._places(i), epoch)

    def _places(self, i: int) -> np.ndarray:
        return np.arange(self.joined.bounds[i], self.joined.bounds[i + 1])

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return stacked(self.elements(indices, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.joined.announce(np.concatenate([self._places(i) for i in indices.tolist()]), epoch)

    def windows(self, size: int, stride: int | None = None) -> EpisodeWindows:
        """Sequences of `size` steps of one episode, one every `stride` (default: `size`): `(size, …)`.

        They begin anew in each episode; its last steps that fill no window are dropped, and shorter episodes whole. `.groups`
        `(W,)` are the numbers of their episodes. Raises `ArgumentError` where no episode has `size` steps.

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

    def __init__(self, joined: Concat | Stretches, size: int, stride: int) -> None:
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

    @property
    def groups(self) -> np.ndarray:
        """The number of the episode of each window, `(W,)` int64."""
        return np.repeat(np.arange(len(self._counts)), self._counts)

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
