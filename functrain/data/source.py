"""The base of every source: a pure function from a position to an element, with a length."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from functrain.core import tree
from functrain.core.errors import ArgumentError, PositionError, TreeError
from functrain.core.explain import Stage
from functrain.core.tree import Tree
from functrain.data.runs import Runs


class Source:
    """A pure function from position to element, with a length: `source(i)` is the same for ever.

    Elements are trees of tensors. Order, shuffling, sharding and splitting are arithmetic on positions: each
    method gives a new source and reads nothing. A source of your own needs `length` and `get`:

    >>> import torch
    >>> class Squares(Source):
    ...     length = 5
    ...     def get(self, i, epoch):
    ...         return torch.tensor(i * i)
    >>> [batch.tolist() for batch in Squares().batch(2)]
    [[0, 1], [4, 9], [16]]

    - `length`: the number of elements of one epoch; None without end.
    - `get(i, epoch)`: element i in an epoch, for 0 ≤ i < length; nothing that the caller does to it may come back.
    - `take(indices, epoch)`: the elements at `indices` (int64, at least one), stacked along a new first dimension.
    """

    length: int | None

    def get(self, i: int, epoch: int) -> Tree:
        """Element i of an epoch, unchecked: what a source has to define."""
        raise NotImplementedError(f"{type(self).__name__} has to define get(i, epoch)")

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        """The elements at `indices` in an epoch, stacked; a source that can read them at once defines this too."""
        return stacked([self.get(i, epoch) for i in indices.tolist()])

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        """The elements at `indices` will be taken soon: begin with what can be done ahead. Never waits; nothing by default."""

    def runs(self) -> Runs | None:
        """Which neighbours are cheapest read together; None where each element lies alone."""
        return None

    # What it stands on, for explain() and to know whether its order changes with the epoch.
    inner: Sequence[Source] = ()

    @property
    def steady(self) -> bool:
        """Whether every epoch has the same elements in the same order."""
        return all(source.steady for source in self.inner)

    @property
    def deferring(self) -> bool:
        """Whether elements are `Deferred`: a source of your own that gives such sets it to True."""
        return any(source.deferring for source in self.inner)

    def explain(self) -> Stage:
        """What this source reads, in which order, and what it stands on."""
        return Stage(type(self).__name__.lower(), self.facts(), [source.explain() for source in self.inner])

    def facts(self) -> dict[str, str]:
        """The lines of `explain`: the length first."""
        return {"length": "endless" if self.length is None else f"{self.length:,}"}

    # --- reading ---------------------------------------------------------------------------------------------

    def __call__(self, i: int) -> Tree:
        """Element i of the first epoch; `PositionError` outside 0 … length−1."""
        place = operator.index(i)
        if place < 0 or (self.length is not None and place >= self.length):
            raise PositionError(self._outside(place))
        return self.get(place, 0)

    def _outside(self, place: int) -> str:
        if self.length is None:
            return f"position {place} is negative: positions count from 0"
        held = f"positions run from 0 to {self.length - 1}" if self.length else "it has no elements"
        more = "" if place < 0 else "; source.repeat() goes on with the next epoch"
        return f"position {place} lies outside a source of length {self.length}: {held}{more}"

    def __len__(self) -> int:
        if self.length is None:
            raise ArgumentError("this source has no end, so no len(): see source.length, which is None")
        return self.length

    def __bool__(self) -> bool:
        return self.length != 0

    def __iter__(self) -> Iterator[Tree]:
        """The elements of one epoch, in order."""
        for place in itertools.count() if self.length is None else range(self.length):
            yield self.get(place, 0)

    def __repr__(self) -> str:
        return f"<source {self.explain().title}, length {'endless' if self.length is None else self.length}>"

    # --- new sources from this one ---------------------------------------------------------------------------

    def epoch(self, epoch: int) -> Source:
        """The source as it is in one epoch: another epoch of a shuffled source is another order."""
        from functrain.data.order import Epoch

        return Epoch(self, integer("epoch", epoch, 0))

    def shuffle(self, seed: int | None = None) -> Source:
        """The same elements in an order drawn from `seed`, a new one each epoch; nothing is stored or read.

        Any int is a seed; `ArgumentError` without one, and for a source without end.

        >>> import functrain as ft, torch
        >>> source = ft.arrays(torch.arange(6)).shuffle(seed=0)
        >>> sorted(int(x) for x in source), [int(x) for x in source] == [int(x) for x in source.epoch(1)]
        ([0, 1, 2, 3, 4, 5], False)
        """
        from functrain.data.order import Shuffle

        if seed is None:
            raise ArgumentError("shuffle needs a seed, so that the order can be had again: source.shuffle(seed=0)")
        return Shuffle(self.finite("shuffle"), integer("seed", seed))

    def batch(self, size: int, drop_last: bool = False) -> Source:
        """`size` neighbours at a time, stacked to `(size, …)`; the last batch has what is left, or is dropped.

        Batches end with the epoch. Raises `ArgumentError` for a size below 1, and where no batch would be left.

        >>> import functrain as ft, torch
        >>> [b.tolist() for b in ft.arrays(torch.arange(5)).batch(2)]
        [[0, 1], [2, 3], [4]]
        """
        from functrain.data.transform import Batch

        return Batch(self.undeferred("batch"), integer("size", size, 1), bool(drop_last))

    def map(self, fn: Callable[[Any], Tree]) -> Source:
        """`fn` of every element: on examples before `.batch`, on whole batches after it. `fn` must be pure.

        >>> import functrain as ft, torch
        >>> [int(x) for x in ft.arrays(torch.arange(3)).map(lambda x: 10 * x)]
        [0, 10, 20]
        """
        from functrain.data.transform import Map

        if not callable(fn):
            raise ArgumentError(f"map takes a function of an element, got {type(fn).__name__}")
        return Map(self.undeferred("map"), fn)

    def zip(self, *others: Source) -> Source:
        """This source and others side by side: elements are tuples. `ArgumentError` where lengths differ.

        >>> import functrain as ft, torch
        >>> ft.arrays(torch.arange(3)).zip(ft.arrays(torch.arange(3) * 10))(2)
        (tensor(2), tensor(20))
        """
        from functrain.data.transform import Zip

        return Zip(self, *others)

    def shard(self, rank: int, size: int) -> Source:
        """Every `size`-th element from `rank` on: the shards of all ranks are disjoint and cover the source.

        Lengths differ by at most one. Raises `ArgumentError` for a rank outside 0 … size−1.

        >>> import functrain as ft, torch
        >>> [int(x) for x in ft.arrays(torch.arange(5)).shard(1, 2)]
        [1, 3]
        """
        from functrain.data.order import Shard

        size = integer("size", size, 1)
        rank = integer("rank", rank, 0)
        if rank >= size:
            raise ArgumentError(f"rank must lie in 0 … {size - 1}, got {rank} of size {size}")
        return Shard(self, rank, size)

    def split(self, *fractions: float, seed: int | None = None) -> tuple[Source, ...]:
        """Disjoint parts that hold these fractions of the elements, and one more for what is left to 1.

        Parts are contiguous, or with a `seed` drawn at random, once for all epochs. Raises `ArgumentError` for
        fractions that sum to more than 1, a part without elements, and for a shuffled source, whose elements
        would pass from one part into another between epochs: split first, then shuffle.

        >>> import functrain as ft, torch
        >>> train, test = ft.arrays(torch.arange(10)).split(0.8, seed=0)
        >>> len(train), len(test)
        (8, 2)
        """
        from functrain.data.order import split

        return split(self.finite("split"), fractions, None if seed is None else integer("seed", seed))

    def windows(self, size: int, stride: int | None = None) -> Source:
        """Sequences of `size` neighbours, one every `stride` (default: `size`), stacked to `(size, …)`.

        What is left over at the end is dropped. Raises `ArgumentError` where not one window fits.

        >>> import functrain as ft, torch
        >>> [w.tolist() for w in ft.arrays(torch.arange(7)).windows(3, stride=2)]
        [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
        """
        from functrain.data.windows import Windows

        size = integer("size", size, 1)
        return Windows(self.undeferred("windows"), size, size if stride is None else integer("stride", stride, 1))

    def repeat(self, epochs: int | None = None) -> Source:
        """Epoch after epoch: position p is element p mod L of epoch p // L; without end unless `epochs` is given.

        >>> import functrain as ft, torch
        >>> endless = ft.arrays(torch.arange(3)).repeat()
        >>> int(endless(7)), endless.length
        (1, None)
        """
        from functrain.data.order import Repeat

        return Repeat(self.finite("repeat"), None if epochs is None else integer("epochs", epochs, 1))

    def deferred(self) -> Source:
        """Batches that nobody reads before their examples are needed: element i is a `Deferred` of batch i.

        Each worker of `parallel` draws the rows of its own part, which are the same wherever the batch is cut.
        Raises `ArgumentError` for anything but what `.batch` gives: map and zip come before it.

        >>> import functrain as ft, torch
        >>> [draw().tolist() for draw in ft.arrays(torch.arange(8)).batch(5).deferred()(0).parts(2)]
        [[0, 1, 2], [3, 4]]
        """
        from functrain.data.deferred import deferred

        return deferred(self)

    def drawn(self) -> Source:
        """Batches that were deferred, drawn whole by whoever asks for them: what `prefetch` and compiled steps take."""
        from functrain.data.deferred import Drawn

        return Drawn(self) if self.deferring else self

    def balanced(self, labels: Any, seed: int = 0, length: int | None = None) -> Source:
        """The elements in class-balanced order: each C neighbours, from a multiple of C on, hold every class once.

        `labels` `(n,)`, ints or strings, name each element's class; there are C. Classes take turns in ascending order, each
        with a shuffled order of its own: all of its elements, then again in another order, on into the next epoch. Small
        ones repeat; of large ones an epoch shows a part. An epoch has C·⌈n/C⌉ elements, or `length`.
        Shard its batches, or shard first: `source.shard(rank, size).balanced(labels[rank::size])`.

        Raises `ArgumentError` for labels that are missing or not one for each element, a source that is empty, endless or
        shuffled already, and a length below C.

        >>> import functrain as ft, torch
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 2])
        >>> [batch.tolist() for batch in ft.arrays(labels).balanced(labels).batch(3)]
        [[0, 1, 2], [0, 1, 2]]
        """
        from functrain.data.balanced import Balanced

        return Balanced(self.finite("balanced"), labels, integer("seed", seed), length)

    def poisson(self, rate: float, seed: int, pad: int = 64) -> Source:
        """Poisson-subsampled batches, as privacy accounting assumes: each element is in each with probability `rate`.

        Elements are `(rows, drawn)`, `drawn` `(M,)` float32 being 1 for rows that were drawn and 0 for those that fill up
        to a multiple of `pad` (so that shapes are few): return it as the loss's weights. An epoch has about 1 / rate
        batches, drawn by seed, epoch and position alone; an element comes once an epoch on average. It is the
        seed that hides who was in a batch: keep it secret, and give each shard another one.

        Raises `ArgumentError` for a rate outside (0, 1], a pad below 1, and a source that is empty or endless.

        >>> import functrain as ft, torch
        >>> rows, drawn = ft.arrays(torch.arange(100)).poisson(rate=0.1, seed=0, pad=8)(0)
        >>> rows.shape, int(drawn.sum())
        (torch.Size([16]), 10)
        """
        from functrain.data.poisson import Poisson

        return Poisson(self.undeferred("poisson").finite("poisson"), rate, integer("seed", seed), integer("pad", pad, 1))

    def undeferred(self, purpose: str) -> Source:
        """This source; `ArgumentError` if its batches are deferred, where `purpose` needs examples."""
        if self.deferring:
            raise ArgumentError(
                f"{purpose} needs examples, and these batches are deferred: {purpose} first, then .batch(…).deferred(); "
                "or have them read whole, source.drawn()"
            )
        return self

    def finite(self, purpose: str) -> Source:
        """This source; `ArgumentError` if it has no end, which `purpose` needs."""
        if self.length is None:
            raise ArgumentError(f"{purpose} needs a source with an end: {purpose} first, then repeat()")
        return self


def stacked(elements: list[Tree]) -> Tree:
    """Elements as one tree with a new first dimension; `TreeError` that says so where they do not fit together."""
    try:
        return tree.stack(elements)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TreeError(
            f"elements of different shape, dtype or structure cannot be stacked: {error}. Make them alike with "
            ".map(fn), or drop a ragged last batch with .batch(size, drop_last=True)"
        ) from error


def integer(name: str, value: Any, least: int | None = None) -> int:
    """The argument `name` as an int; `ArgumentError` where it is none, or less than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ArgumentError(f"{name} must be an int, got {value!r}")
    if least is not None and number < least:
        raise ArgumentError(f"{name} must be at least {least}, got {number}")
    return number
