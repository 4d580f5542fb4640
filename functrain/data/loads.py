"""What a loader does to have one element ready."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import numpy as np

from functrain.core import tree
from functrain.core.tree import Tree
from functrain.data.budget import Account
from functrain.data.positions import EndedError
from functrain.data.source import Source
from functrain.data.streams import Load, Parcel
from functrain.data.transfer import Transfer
from functrain.data.turns import PlannedTurns
from functrain.data.waits import Clock


def following(items: Iterator[Tree]) -> Load:
    """The next item of an iterator."""
    return lambda number, clock: next(items)


def positioned(source: Source, start: int, count: int | None) -> Load:
    """Element `start` + number of a source, for numbers below `count`."""
    get, end = source.get, math.inf if count is None else count

    def load(number: int, clock: Clock) -> Tree:
        if number >= end:
            raise StopIteration
        try:
            return get(start + number, 0)
        except EndedError:
            if count is not None:
                raise
            raise StopIteration from None
        except StopIteration as slip:
            # It would end the stream as if there were no more elements.
            raise RuntimeError(f"the source raised StopIteration at position {start + number}, which ends nothing") from slip

    return load


def announced(load: Load, source: Source, start: int, turns: PlannedTurns) -> Load:
    """`load`, once the source was told of all elements that are planned by now."""

    # Nobody loads an element that another loader is about to tell of.
    lock = threading.Lock()

    def told(number: int, clock: Clock) -> Tree:
        with lock:
            numbers = turns.fresh()
            if numbers:
                source.announce(np.array(numbers) + start, 0)
        return load(number, clock)

    return told


def parcelled(load: Load, turns: PlannedTurns, transfer: Transfer | None) -> Load:
    """What `load` gives, sent to its device, its size known to the turns and the clock."""

    def parcel(number: int, clock: Clock) -> Parcel:
        element, event = load(number, clock), None
        if transfer is not None:
            element, event = transfer.send(element)
        size = size_of_element(element)
        clock.bytes += size
        turns.loaded(number, size)
        return Parcel(element, size, event)

    return parcel


def opener(account: Account | None, transfer: Transfer | None) -> Callable[[Parcel], Tree]:
    """What is done with a parcel where it is taken: its bytes are given back, its copy is waited for."""

    def opened(parcel: Parcel) -> Tree:
        if account is not None:
            account.end(parcel.size)
        return parcel.element if transfer is None else transfer.receive(parcel.element, parcel.event)

    return opened


def size_of_element(element: Tree) -> int:
    """Bytes of the tensors, arrays and bytes in a tree.

    >>> size_of_element({"x": np.zeros((2, 3), "f4"), "name": b"four"})
    28
    """
    return sum(len(leaf) if isinstance(leaf, bytes) else getattr(leaf, "nbytes", 0) for leaf in tree.leaves(element))


__all__ = ["announced", "following", "opener", "parcelled", "positioned", "size_of_element"]
