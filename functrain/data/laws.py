"""The laws of sources and of prefetching, as checks for a source of one's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from functrain.core import tree
from functrain.core.deferred import Deferred, drawn
from functrain.core.errors import PositionError
from functrain.core.tree import Tree
from functrain.data.arrays import arrays
from functrain.data.prefetch import Prefetch, prefetch
from functrain.data.source import Source

_SAMPLES = 48


def check_source(source: Source) -> None:
    """Check law 5 on a source: an element is the same for ever, and order is arithmetic on positions.

    Looks at up to 48 positions of the source itself, and at all positions of what `shuffle`, `shard`, `split`,
    `batch` and `repeat` make of it. Of deferred batches it looks at what they draw, whole and in parts. Raises
    `AssertionError` that names the first law broken.

    >>> check_source(arrays(torch.arange(10)).shuffle(seed=3).batch(4))
    """
    places = _places(source)
    _check_elements(source, places)
    if source.deferring:
        _check_cuts(source, places)
    else:
        _check_take(source, places)
    _check_epochs(source, places)
    _check_hints(source, places)
    if source.length:
        _check_order(source, places)
        _check_repeat(source, places)


def same(first: Tree, second: Tree) -> bool:
    """Whether two trees have the same structure, and leaves of the same shape, dtype and bits; deferred ones are drawn.

    >>> same({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(float("nan"))})
    True
    """
    first, second = drawn(first), drawn(second)
    if not tree.same_structure(first, second):
        return False
    pairs = zip(tree.leaves(first), tree.leaves(second))
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(leaf: torch.Tensor) -> torch.Tensor:
    flat = leaf.detach().contiguous().reshape(-1)
    # An empty tensor may have strides by which torch refuses to view it.
    return flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8)


def _places(source: Source) -> list[int]:
    if source.length is None:
        return list(range(_SAMPLES))
    return sorted(set(np.linspace(0, source.length - 1, _SAMPLES).astype(int).tolist())) if source.length else []


# --- law 5 -------------------------------------------------------------------------------------------------


def _check_elements(source: Source, places: list[int]) -> None:
    for i in places:
        given = source(i)
        assert isinstance(given, Deferred) == source.deferring, f"element {i} is {given!r}, and source.deferring says otherwise"
        element = drawn(given)
        assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(element)), f"element {i} is no tree of tensors"
        kept = tree.map(torch.clone, element)
        assert same(source(i), kept), f"element {i} differs from one call to the next"
        tree.map(lambda leaf: leaf.zero_(), element)
        assert same(source(i), kept), f"element {i} changes with what is done to an element handed out before"
    outside = [-1] if source.length is None else [-1, source.length]
    for i in outside:
        try:
            source(i)
        except PositionError:
            continue
        raise AssertionError(f"position {i} lies outside, and is no PositionError")


def _check_cuts(source: Source, places: list[int]) -> None:
    for epoch in (0, 1):
        for i in places:
            batch = source.get(i, epoch)
            whole = batch.whole()
            assert tree.batch_size(whole) == batch.size, f"batch {i} says that it holds {batch.size} examples"
            for parts in (2, 3, 7):
                # Last ones first: workers keep no order.
                drawings = [draw() for draw in batch.parts(parts)[::-1]][::-1]
                assert same(tree.concat(drawings), whole), f"batch {i} is another in {parts} parts, in epoch {epoch}"


def _check_take(source: Source, places: list[int]) -> None:
    # Out of order, and one of them twice.
    chosen = [*places[::-1], places[len(places) // 2]] if places else []
    for epoch in (0, 1):
        elements = [source.get(i, epoch) for i in chosen]
        if elements:
            read = source.elements(np.array(chosen), epoch)
            assert same(tuple(read), tuple(elements)), f"elements, read at once, are not those of get, in epoch {epoch}"
        if elements and _alike(elements):
            taken = source.take(np.array(chosen), epoch)
            assert same(taken, tree.stack(elements)), f"take is not the elements stacked, in epoch {epoch}"


def _alike(elements: list[Tree]) -> bool:
    return all(
        tree.same_structure(elements[0], other)
        and all(a.shape == b.shape for a, b in zip(tree.leaves(elements[0]), tree.leaves(other)))
        for other in elements
    )


def _check_epochs(source: Source, places: list[int]) -> None:
    for epoch in (0, 1, 7):
        later = source.epoch(epoch)
        for i in places:
            element = source.get(i, epoch)
            assert same(later(i), element), f"epoch({epoch}) differs from get(i, {epoch}) at position {i}"
            assert not source.steady or same(source(i), element), f"a steady source changed at {i} in epoch {epoch}"


def _check_hints(source: Source, places: list[int]) -> None:
    if places:
        before = source(places[0])
        source.announce(np.array(places), 0)
        assert same(source(places[0]), before), "an element changed when it was announced"
    runs = source.runs()
    assert runs is None or runs.length == source.length, f"runs are of {runs.length} elements, the source has {source.length}"


def _check_order(source: Source, places: list[int]) -> None:
    length = len(source)
    numbers = arrays(torch.arange(length))
    for epoch in (0, 1):
        order = _numbers(numbers.shuffle(5).epoch(epoch))
        assert sorted(order) == list(range(length)), "a shuffle is not a bijection"
        shuffled = source.shuffle(5).epoch(epoch)
        assert all(same(shuffled(i), source.get(order[i], epoch)) for i in places), "a shuffle lost an element's epoch"
    for size in (1, 2, 3, length + 1):
        shards = [numbers.shard(rank, size) for rank in range(size)][: length + 1]
        assert sorted(n for shard in shards for n in _numbers(shard)) == list(range(length)), "shards do not cover"
        for rank, shard in enumerate(shards):
            theirs = source.shard(rank, size)
            assert len(theirs) == len(shard), "shards have other lengths than their elements"
            assert all(same(theirs(i), source(rank + size * i)) for i in range(min(3, len(shard)))), "shards mix elements"
    for size in (1, 2, length, length + 1):
        batches = list(numbers.batch(size))
        assert torch.cat(batches).tolist() == list(range(length)), "batches do not cover"
    for seed in (None, 5):
        if length > 1:
            parts = numbers.split(0.5, seed=seed)
            assert sorted(n for part in parts for n in _numbers(part)) == list(range(length)), "parts do not cover"


def _numbers(source: Source) -> list[int]:
    return [int(n) for n in source]


def _check_repeat(source: Source, places: list[int]) -> None:
    length = len(source)
    endless, twice = source.repeat(), source.repeat(2)
    assert endless.length is None
    assert len(twice) == 2 * length
    for i in places:
        for epoch in (0, 1):
            expected = source.get(i, epoch)
            assert same(endless(i + epoch * length), expected), f"repeat differs at {i} of epoch {epoch}"
            assert same(twice(i + epoch * length), expected), f"repeat(2) differs at {i} of epoch {epoch}"


# --- law 4 -------------------------------------------------------------------------------------------------


def check_prefetch(source: Source, depth: int = 4, **options: Any) -> None:
    """Check law 4 on a finite source: prefetching changes nothing, keeps its bound, and always ends.

    Reads two epochs. `options` are what else `prefetch` takes; a memory has to have room for `depth` elements. Raises
    `AssertionError` that names what is broken.

    >>> check_prefetch(arrays(torch.arange(10)).shuffle(seed=3).batch(4), depth=2, workers=2)
    """
    before = _loaders()
    length = len(source)
    with prefetch(source, depth, **options) as batches:
        _compare(batches, iter(source), "one epoch")
        endless = source.repeat()
        crossing = batches.between(length // 2, length + length // 2)
        _compare(crossing, (endless(i) for i in range(length // 2, length + length // 2)), "between")
    _check_bound(source, depth, **options)
    for failing in sorted({0, length // 2, length - 1}):
        _check_failure(source, depth, failing, **options)
    for taken in sorted({0, 1, length // 2}):
        with prefetch(source, depth, **options) as batches:
            stream = batches.between(0)
            for _ in range(taken):
                next(stream)
    assert _loaders() <= before, "a thread outlived its prefetch"


def _loaders() -> set[threading.Thread]:
    # A source may have threads of its own, for as long as it is open.
    return {thread for thread in threading.enumerate() if thread.name == "functrain-prefetch"}


def _compare(stream: Prefetch | Iterator[Tree], expected: Iterator[Tree], what: str) -> None:
    for place, (ours, theirs) in enumerate(zip(stream, expected, strict=True)):
        assert same(ours, theirs), f"{what}: element {place} differs with prefetching"


class _Watched(Source):
    """A source that counts the loads begun, and fails at one position if so asked."""

    def __init__(self, source: Source, failing: int | None = None) -> None:
        self.source, self.inner, self.length, self.failing = source, (source,), source.length, failing
        self.asked, self.begun, self.ahead = 0, 0, 0
        self.changed = threading.Condition()

    def get(self, i: int, epoch: int) -> Tree:
        with self.changed:
            self.begun += 1
            self.ahead = max(self.ahead, self.begun - self.asked)
            self.changed.notify_all()
        if i == self.failing:
            raise _DeliberateError(f"element {i}")
        return self.source.get(i, epoch)


class _DeliberateError(Exception):
    pass


def _check_bound(source: Source, depth: int, **options: Any) -> None:
    watched = _Watched(source)
    length = len(source)
    with prefetch(watched, depth, **options) as batches:
        stream = iter(batches)
        for taken in range(length):
            with watched.changed:
                full = watched.changed.wait_for(lambda: watched.begun >= min(length, watched.asked + depth), 30.0)
            assert full, f"after {taken} elements, the next {depth} are not being loaded"
            # Counted before it is taken: the loads that taking allows may begin before `next` returns.
            watched.asked += 1
            next(stream)
    assert watched.ahead <= depth, f"{watched.ahead} elements were outstanding at depth {depth}"


def _check_failure(source: Source, depth: int, failing: int, **options: Any) -> None:
    with prefetch(_Watched(source, failing), depth, **options) as batches:
        stream = iter(batches)
        for i in range(failing):
            assert same(next(stream), source(i)), f"element {i}, before a failing one, differs"
        surfaced = None
        try:
            next(stream)
        except _DeliberateError as error:
            surfaced = str(error)
        assert surfaced == f"element {failing}", f"at failing element {failing} surfaced: {surfaced or 'no error'}"
        assert next(stream, None) is None, "a stream went on after its error"


__all__ = ["check_prefetch", "check_source", "same"]
