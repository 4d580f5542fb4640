"""Loading ahead: threads that have the next elements ready, and change nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage, readable
from functrain.core.heap import settled
from functrain.core.tree import Tree
from functrain.data.arguments import integer
from functrain.data.budget import Account, Budget
from functrain.data.foreign import Iterated
from functrain.data.loads import announced, following, opener, parcelled, positioned
from functrain.data.source import Source
from functrain.data.streams import Load, Stream
from functrain.data.transfer import Transfer, checked_device
from functrain.data.turns import PlannedTurns, Turns
from functrain.data.waits import Stats


def prefetch(
    source: Source | Iterable[Tree],
    depth: int = 4,
    *,
    workers: int = 1,
    memory: int | str | Budget | None = None,
    device: Any = None,
) -> Prefetch:
    """Load the next `depth` elements of a source, or of any iterable, in a thread, while the last one is worked on.

    Inside its `with` block it gives the same elements in the same order, one epoch of them; of a source,
    `batches.between(start, stop)` gives those at positions start … stop−1 of `source.repeat()`. At most `depth`
    elements are loaded, or being loaded, at any time, and taking one starts the next load. One stream is open
    at a time: opening the next ends the one before. A source's error is raised at the element it belongs to,
    and ends the stream. Threads may share a stream: each element, and the error, goes to one of them. Leaving the
    block, in whatever way, waits for the loads under way and ends the threads.

    - `workers`: threads that load, at most `depth`; more than one needs a source whose elements can be read in any order.
    - `memory`: bytes that elements may hold which are loaded and not yet taken: an int, "256 MiB", or an `ft.Budget` that
      the source has too (`ft.hdf5(…, memory=budget)`). A load waits until there is room for an element as large as the
      last one; one element may always be there, however large.
    - `device`: where elements are copied to. On a GPU from pinned memory, on a stream of their own: the copy overlaps with
      what is computed, and work on an element begins when its copy is done.

    A source that can begin ahead (`ft.hdf5(…, threads=4)`) is told of all elements that may be loaded (`Source.announce`).
    `batches.stats` says who waits for whom: `print(batches.stats)`.

    Raises `ArgumentError` for a depth or workers below 1, more workers than `depth` or than one for an iterable, a memory that
    is no size, a device that is not there, anything that is no iterable, deferred batches (which workers read), and outside a
    `with` block.

    >>> import functrain as ft, torch
    >>> with ft.prefetch(ft.arrays(torch.arange(5)).batch(2), depth=4) as batches:
    ...     print([b.tolist() for b in batches], [b.tolist() for b in batches.between(2, 5)])
    [[0, 1], [2, 3], [4]] [[4], [0, 1], [2, 3]]
    """
    return Prefetch(source, depth, workers=workers, memory=memory, device=device)


class Prefetch:
    """Elements of `source`, loaded ahead; see `prefetch`. `length` is that of the source, None where not known."""

    def __init__(
        self,
        source: Source | Iterable[Tree],
        depth: int = 4,
        *,
        workers: int = 1,
        memory: int | str | Budget | None = None,
        device: Any = None,
    ) -> None:
        depth, workers = integer("depth", depth, 1), integer("workers", workers, 1)
        if workers > depth:
            raise ArgumentError(f"at most depth={depth} elements are loaded at a time, so by as many workers: got {workers}")
        _check_source(source, workers)
        self.source, self.depth, self.workers = source, depth, workers
        self.memory = None if memory is None else Budget.of(memory)
        self.device = None if device is None else checked_device(device)
        self.length: int | None = source.length if isinstance(source, Source) else None
        self._entered = False
        self._stream: Stream | None = None
        self._before: Stats | None = None

    def __enter__(self) -> Prefetch:
        if self._entered:
            raise ArgumentError("this prefetch is in use already: make another")
        # Elements are freed in one thread and made in another: pages that went back in between cost up to a third of the time.
        settled()
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, after the loads under way; safe at any time, and more than once."""
        self._entered = False
        if self._stream is not None:
            self._stream.close("the `with` block of this prefetch has ended")

    def __iter__(self) -> Iterator[Tree]:
        """The elements of one epoch; of an iterator, what it has left."""
        if isinstance(self.source, Source):
            return self.between(0, self.source.length)
        self._check()
        items = iter(self.source)
        if items is self.source and self._stream is not None and self._stream.alive:
            # An iterator cannot begin again: elements that are loaded already would be lost to a new stream.
            return self._stream
        return self._open(following(items))

    def between(self, start: int = 0, stop: int | None = None) -> Iterator[Tree]:
        """The elements at positions start … stop−1 of `source.repeat()`; without end unless `stop` is given."""
        self._check()
        if not isinstance(self.source, Source):
            raise ArgumentError("between needs a source, whose elements have positions; this is a plain iterable")
        if start < 0 or (stop is not None and stop < start):
            raise ArgumentError(f"between takes 0 ≤ start ≤ stop, got start={start}, stop={stop}")
        if start == stop:
            return iter(())
        endless = self.source if self.source.length is None else self.source.repeat()
        count = None if stop is None else stop - start
        return self._open(positioned(endless, start, count), endless, start, count)

    def _check(self) -> None:
        if not self._entered:
            raise ArgumentError("prefetch loads in a thread, which has to end: use it as `with prefetch(source) as batches:`")

    def _open(self, load: Load, source: Source | None = None, start: int = 0, count: int | None = None) -> Stream:
        stream = self._opened(load, source, start, count)
        if not self._entered:
            # Another thread has left the block since, and may not have seen this stream.
            self.close()
            self._check()
        return stream

    def _opened(self, load: Load, source: Source | None, start: int, count: int | None) -> Stream:
        if self._stream is not None:
            self._stream.close("another stream of this prefetch was opened since: make a prefetch for each")
            self._before, self._stream = self.stats, None
        heeding = source if source is not None and source.heeding else None
        if self.memory is None and self.device is None and heeding is None:
            self._stream = Stream(load, Turns(self.depth), self.workers)
            return self._stream
        account = None if self.memory is None else Account(self.memory)
        turns = PlannedTurns(self.depth, count, account, telling=heeding is not None)
        if heeding is not None:
            load = announced(load, heeding, start, turns)
        if self.memory is None and self.device is None:
            self._stream = Stream(load, turns, self.workers)
            return self._stream
        transfer = None if self.device is None else Transfer(self.device)
        load = parcelled(load, turns, transfer)
        self._stream = Stream(load, turns, self.workers, opener(account, transfer), account.settle if account else None)
        return self._stream

    @property
    def stats(self) -> Stats:
        """What was done since the block began, and who waited for whom."""
        now = self._stream.stats() if self._stream is not None else Stats(workers=self.workers)
        return now if self._before is None else self._before.plus(now)

    def explain(self) -> Stage:
        """What is loaded, how far ahead, by how many threads, and what was waited for."""
        facts = {
            "depth": f"{self.depth} elements loaded or being loaded at any time",
            "workers": "1 thread" if self.workers == 1 else f"{self.workers} threads",
        }
        if self.memory is not None:
            facts["memory"] = f"loaded and not yet taken: at most {readable(self.memory.limit)}, or one element"
        if self.device is not None:
            facts["device"] = str(self.device)
        if self.stats.items:
            facts["so far"] = str(self.stats)
        known = isinstance(self.source, Source)
        inner = [self.source.explain()] if isinstance(self.source, Source) else []
        return Stage("prefetch", facts if known else {**facts, "of": type(self.source).__name__}, inner)


def _check_source(source: Any, workers: int) -> None:
    if not isinstance(source, (Source, Iterable)):
        raise ArgumentError(f"prefetch takes a source or an iterable, got {type(source).__name__}")
    if workers > 1 and _sequential(source):
        raise ArgumentError(
            f"{workers} workers need elements that can be read in any order: an iteration gives one after the other, workers=1"
        )
    if isinstance(source, Source) and source.deferring:
        raise ArgumentError(
            "the batches of this source are deferred: workers read them, so there is nothing to load ahead. Use the source "
            "as it is (an Experiment with depth=0), or have it read whole, ahead: prefetch(source.drawn())"
        )


def _sequential(source: Any) -> bool:
    if not isinstance(source, Source) or isinstance(source, Iterated):
        return True
    return any(_sequential(inner) for inner in source.inner)
