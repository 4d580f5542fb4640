"""Sources of batches that their workers draw: `deferred` batches of a source, and `sampled` ones of a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.deferred import Deferred, drawn
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage
from functrain.core.tree import Tree
from functrain.data.arguments import integer
from functrain.data.source import Source
from functrain.data.transform import Batch, as_tensor


def deferred(source: Source) -> Source:
    """The batches of `Source.deferred`, which see."""
    if source.deferring:
        raise ArgumentError("the batches of this source are deferred already")
    if isinstance(source, Batch):
        return DeferredBatches(source)
    if _batched(source):
        raise ArgumentError(
            f"deferred takes the batches that .batch gives, got {source!r}: write .deferred() right after .batch(size); "
            "map and zip before it, where they see examples, and shuffle, shard, split or repeat after it"
        )
    raise ArgumentError(f"deferred takes batches, got {source!r}: batch it first, source.batch(size).deferred()")


def _batched(source: Source) -> bool:
    return isinstance(source, Batch) or any(_batched(inner) for inner in source.inner)


class _Deferring(Source):
    """What sources of deferred batches have in common."""

    deferring = True

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return self.undeferred("take")


class DeferredBatches(_Deferring):
    """The batches of a source, not read yet."""

    def __init__(self, batches: Batch) -> None:
        self.batches, self.inner, self.length = batches, (batches,), batches.length

    def get(self, i: int, epoch: int) -> Deferred:
        places = self.batches.places(i)
        return Deferred(len(places), partial(self._rows, places, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.batches.announce(indices, epoch)

    def _rows(self, places: range, epoch: int, start: int, stop: int) -> Tree:
        here = places[start:stop]
        return self.batches.source.take(np.arange(here.start, here.stop), epoch)

    def explain(self) -> Stage:
        return Stage("deferred", self.facts(), [self.batches.explain()])

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "read": "by the worker that takes a part's gradient, its rows alone"}


class Drawn(Source):
    """Deferred batches, drawn whole."""

    deferring = False

    def __init__(self, source: Source) -> None:
        self.source, self.inner, self.length = source, (source,), source.length

    def get(self, i: int, epoch: int) -> Tree:
        return drawn(self.source.get(i, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.source.announce(indices, epoch)


def sampled(sample: Callable[[Tensor], Tree], size: int, seed: int = 0) -> Source:
    """Batches of `size` examples that a function makes, without end; each worker makes the examples of its own part.

    `sample(keys)` is given an int64 tensor `(n,)`, a key for each of n examples, and returns a tree of n rows `(n, …)`. It is a
    pure function, and row j depends on key j alone (draw with `ft.random`): then examples are the same whatever the
    number of parts and workers. Element i is a `Deferred` batch with the keys
    `example_keys(fold_in(key(seed), i), size)`: `parallel` calls `sample` once for each part, in the part's worker, with the
    keys of the part. Other gradients call it once for the batch; `.drawn()` gives batches made by one producer.

    There is no end, so say how many steps: `ft.fold(step, state, source, steps=…)`; for a measure over some of them,
    `ft.evaluate(loss, params, itertools.islice(source, 10))`.

    Raises `ArgumentError` for a sample that is no function and a size below 1; `TreeError`, where a batch is drawn, for a
    sample that gives another number of rows, or leaves that are neither tensors nor arrays.

    >>> import functrain as ft
    >>> source = ft.sampled(lambda keys: {"x": ft.random.normal(keys, (2,))}, 5)
    >>> [draw()["x"].shape for draw in source(0).parts(2)]
    [torch.Size([3, 2]), torch.Size([2, 2])]
    """
    if not callable(sample):
        raise ArgumentError(f"sampled takes a function of keys (n,) that gives n examples, got {type(sample).__name__}")
    return Sampled(sample, integer("size", size, 1), integer("seed", seed))


class Sampled(_Deferring):
    """Batches of what a function makes of keys."""

    length = None

    def __init__(self, sample: Callable[[Tensor], Tree], size: int, seed: int) -> None:
        self.sample, self.size, self.seed = sample, size, seed
        self.key = random.key(seed)

    def get(self, i: int, epoch: int) -> Deferred:
        return Deferred(self.size, partial(self._made, random.fold_in(self.key, i)))

    def _made(self, key: Tensor, start: int, stop: int) -> Tree:
        # The keys start … stop of random.example_keys(key, size).
        made = self.sample(random.fold_in(key, torch.arange(start, stop)))
        rows = tree.map(partial(as_tensor, what="sample"), made)
        if tree.batch_size(rows) != stop - start:
            raise TreeError(f"sample was given {stop - start} keys and made {tree.batch_size(rows)} examples: one for each key")
        return rows

    def facts(self) -> dict[str, str]:
        name = getattr(self.sample, "__qualname__", type(self.sample).__name__)
        keys = f"one for each example, of seed {self.seed} and the batch's position"
        return {**super().facts(), "batches": f"endless of {self.size}", "sample": name, "keys": keys}
