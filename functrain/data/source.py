"""A source: a pure function from a position to an element, with a length, and the sources that can be made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from functrain.core.errors import ArgumentError
from functrain.core.tree import Tree
from functrain.data.arguments import integer, ranked
from functrain.data.positions import Positions

if TYPE_CHECKING:
    from functrain.data.order import Shuffle


class Source(Positions):
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

    A source is a `torch.utils.data.Dataset` too: a DataLoader takes it, and then says in which order.
    """

    inner: Sequence[Source] = ()

    def epoch(self, epoch: int) -> Source:
        """The source as it is in one epoch: another epoch of a shuffled source is another order."""
        from functrain.data.order import Epoch

        return Epoch(self, integer("epoch", epoch, 0))

    def shuffle(self, seed: int | None = None, within: int | str | None = None) -> Shuffle:
        """The same elements in an order drawn from `seed`, a new one each epoch; nothing is stored or read.

        With `within`, a number of bytes such as "256 MiB", chunks are shuffled, and elements within blocks of as many chunks
        as that holds: each is decoded once an epoch, if the file's `memory=` has room for two blocks. The order depends on
        `within` and on the chunks, too. `.quality` is 1 for a full shuffle, and less by how much more often than there the next
        element comes from the same chunk. Where each element lies alone it is the full shuffle.

        Any int is a seed; `ArgumentError` without one, and for a source without end.

        >>> import functrain as ft, torch
        >>> source = ft.arrays(torch.arange(6)).shuffle(seed=0)
        >>> sorted(int(x) for x in source), [int(x) for x in source] == [int(x) for x in source.epoch(1)]
        ([0, 1, 2, 3, 4, 5], False)
        """
        from functrain.data.blocks import shuffled

        if seed is None:
            raise ArgumentError("shuffle needs a seed, so that the order can be had again: source.shuffle(seed=0)")
        return shuffled(self.finite("shuffle"), integer("seed", seed), within)

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

        Lengths differ by at most one. For what ranks do apart (evaluation, searches). Ranks that step together take
        `.batch(n).part(rank, size)`: as many steps each, and positions that hold when their number changes. Raises
        `ArgumentError` for a rank outside 0 … size−1.

        >>> import functrain as ft, torch
        >>> [int(x) for x in ft.arrays(torch.arange(5)).shard(1, 2)]
        [1, 3]
        """
        from functrain.data.order import Shard

        return Shard(self, *ranked(rank, size))

    def part(self, rank: int, size: int) -> Source:
        """Of every batch, the contiguous rows of one rank: position i is batch i for all, however many ranks there are.

        All ranks have equally many steps, their parts together are each batch once, and sizes differ by at most one row: a
        run that goes on with another number of ranks, also within an epoch, loses and repeats nothing. Raises
        `ArgumentError` for anything but what `.batch` gives (deferred or not), and a last batch of fewer rows than ranks.

        >>> import functrain as ft, torch
        >>> batches = ft.arrays(torch.arange(8)).batch(4)
        >>> [[b.tolist() for b in batches.part(rank, 3)] for rank in range(3)]
        [[[0, 1], [4, 5]], [[2], [6]], [[3], [7]]]
        """
        from functrain.data.parts import part

        return part(self, rank, size)

    def split(self, *fractions: float, seed: int | None = None, groups: Any = None) -> Sequence[Source]:
        """Disjoint parts that hold these fractions of the elements, and one more for what is left to 1.

        Parts are contiguous, or with a `seed` drawn at random, once for all epochs. `groups` `(n,)`, ints or strings, names
        each element's group (patient, file, episode): all of a group goes to one part, the parts' sizes are as near to
        the fractions as exchanging groups brings them, and elements keep their order. They are an array, a list, or a source
        of numbers, such as `ft.hdf5(path, "person")`; sources over several files or groups, and windows of episodes, have
        them as `.groups`: the number of the file or group, of the episode. Raises `ArgumentError` for
        fractions that sum to more than 1, a part without elements, and for a shuffled source, whose elements
        would pass from one part into another between epochs: split first, then shuffle.

        >>> import functrain as ft, torch
        >>> train, test = ft.arrays(torch.arange(10)).split(0.8, seed=0)
        >>> len(train), len(test)
        (8, 2)
        """
        from functrain.data.order import split

        return split(self.finite("split"), fractions, None if seed is None else integer("seed", seed), groups)

    def windows(self, size: int, stride: int | None = None) -> Source:
        """Sequences of `size` neighbours, one every `stride` (default: `size`), stacked to `(size, …)`.

        What is left over at the end is dropped. Raises `ArgumentError` where not one window fits, and for elements that are
        whole sequences: `ft.episodes` cuts windows out of each.

        >>> import functrain as ft, torch
        >>> [w.tolist() for w in ft.arrays(torch.arange(7)).windows(3, stride=2)]
        [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
        """
        from functrain.data.windows import Windows

        size = integer("size", size, 1)
        if self.sequences:
            raise ArgumentError(
                f"elements of this source are whole sequences, of which windows would stack {size}. To cut windows of {size} "
                f"steps out of each: windows = episodes.windows({size}), and windows.split(…, groups=windows.groups), or "
                f"functrain.episodes(part).windows({size}), with .map after that; to stack whole ones: .batch({size})"
            )
        return Windows(self.undeferred("windows"), size, size if stride is None else integer("stride", stride, 1))

    def padded(self, size: int, value: float = 0, cut: bool = False) -> Source:
        """Elements of different lengths as `(tree of (size, …), mask)`: filled up with `value` where `mask` is False.

        `mask` is `(size,)` bool. All leaves `(T, …)` of an element have its length T; numbers `()` stay as they are. Longer
        elements lose what is beyond `size` if `cut`, and are a `TreeError` otherwise, as are leaves whose lengths differ.
        Raises `ArgumentError` for a size below 1 and a value that is no number; `TreeError` where a dtype cannot hold it.
        The longest is `source.lengths.max()` of `ft.episodes` and `ft.ragged`, `max(map(len, source))` of others, by reading.

        >>> import functrain as ft, torch
        >>> steps, mask = ft.ragged(torch.arange(5), [0, 3, 5]).padded(4, value=-1).batch(2)(0)
        >>> steps.tolist(), mask.sum(1).tolist()
        ([[0, 1, 2, -1], [3, 4, -1, -1]], [3, 2])
        """
        from functrain.data.padded import Padded

        return Padded(self.undeferred("padded"), integer("size", size, 1), value, cut)

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

        `labels` `(n,)`, ints or strings (an array, or a source of numbers), name each element's class; there are C. Classes
        take turns in ascending order, each with a shuffled order of its own: all of its elements, then again in another
        order, on into the next epoch. Small ones repeat; of large ones an epoch shows a part. An epoch has C·⌈n/C⌉ elements,
        or `length`.
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

    def weighted(self, weights: Any, seed: int, length: int | None = None) -> Source:
        """Elements drawn with replacement, element i with probability weights[i] / Σ weights, by seed, epoch and position.

        `weights` `(n,)`, at least 0, one for each element; an epoch has n draws, or `length`; 16 bytes an element. Raises
        `ArgumentError` for weights that do not fit or are all 0, and a source that is empty, endless or shuffled already.

        >>> import functrain as ft, torch
        >>> [int(x) for x in ft.arrays(torch.arange(3)).weighted([3, 0, 1], seed=0, length=8)]
        [0, 0, 0, 2, 0, 0, 0, 0]
        """
        from functrain.data.weighted import Weighted

        return Weighted(self.finite("weighted"), weights, integer("seed", seed), length)

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
