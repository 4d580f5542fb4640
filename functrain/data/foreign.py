"""Sources over what others made: map-style datasets, lists, iterables and generators."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from functrain.core import tree
from functrain.core.errors import ArgumentError, PositionError, TreeError
from functrain.core.tree import Tree
from functrain.data.arguments import integer
from functrain.data.positions import EndedError
from functrain.data.rows import readable, tensor
from functrain.data.source import Source
from functrain.data.stacking import stacked


def source(data: Any, length: int | None = None) -> Source:
    """A source over a map-style dataset, a list, an iterable, or a function that begins an iterator.

    - With `__len__` and `__getitem__` (a `torch.utils.data.Dataset`, a list), element i is `data[i]`; batches are read with
      `__getitems__` where there is one. With several threads (`prefetch(…, workers=4)`) it is called from them all.
    - Otherwise (an `IterableDataset`, any iterable, a generator function), element i is the i-th item. Reading forward is
      cheap; going back begins a new iteration, which has to give the same items again, so shuffle only what is small. An
      iterator that was begun already cannot go back. The length is that of `len`, or None, where `for` and `prefetch` end
      with the iterable, and positions beyond are a `PositionError`; so is an iterable that is shorter than it said.
    - `length` states the length of what has no `len`: the first so many items, which then can be split and cut into windows.

    Items become trees of tensors: tensors are copied, arrays and numbers are converted; text, images and other objects are a
    `TreeError`. What an item is has to follow from its position alone: augment with `ft.random`, keyed by position. A source is
    given back as it is. Errors that `data` raises pass, with the position added.

    Raises `ArgumentError` for arrays and mappings of them (see `ft.arrays`), sets, text, what is none of the above, and a
    `length` for what has one.

    >>> import functrain as ft
    >>> pairs = ft.source([{"x": [1.0, 2.0], "y": 0}, {"x": [3.0, 4.0], "y": 1}])
    >>> pairs.batch(2)(0)
    {'x': [tensor([1., 3.]), tensor([2., 4.])], 'y': tensor([0, 1])}

    >>> def squares():
    ...     n = 0
    ...     while True:
    ...         yield n * n
    ...         n += 1
    >>> endless = ft.source(squares)
    >>> [int(endless(i)) for i in (2, 5, 3)], endless.length
    ([4, 25, 9], None)
    >>> [int(n) for n in ft.source(squares, length=4)]
    [0, 1, 4, 9]
    """
    if length is not None:
        integer("length", length, 1)
        if hasattr(data, "__len__"):
            raise ArgumentError(f"length is for what has no len(), and {_name(data)} has one: take a part of it with .split")
    if isinstance(data, Source):
        return data
    _refuse(data)
    if isinstance(data, Iterable) and (isinstance(data, IterableDataset) or not hasattr(data, "__getitem__")):
        return Iterated(data, partial(iter, data), length)
    if hasattr(data, "__getitem__") and (hasattr(data, "__len__") or length is not None):
        return Indexed(data, length)
    if callable(data):
        return Iterated(data, data, length)
    raise ArgumentError(
        "source takes a dataset with __len__ and __getitem__, an iterable, or a function that begins an iterator; got "
        f"{_name(data)}"
    )


def _refuse(data: Any) -> None:
    if isinstance(data, (Tensor, np.ndarray, Mapping, tuple)) or hasattr(data, "keys"):
        raise ArgumentError(
            f"source takes elements one by one, got {_name(data)}: for arrays whose rows are the elements use ft.arrays(data), "
            "for a tuple of elements list(data)"
        )
    if isinstance(data, (str, bytes, bytearray, os.PathLike)):
        raise ArgumentError(f"source takes a dataset or an iterable, got {_name(data)}: to read a file use ft.hdf5(path)")
    if isinstance(data, (set, frozenset)):
        raise ArgumentError("a set has no order that is the same in every process: source(sorted(data))")


class _Foreign(Source):
    """Elements that may differ in shape, as nobody knows before they are read."""

    ragged = True

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        # Stacking copies.
        return stacked(self._each(indices))

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        return [tree.map(torch.clone, element) for element in self._each(indices)]

    def _each(self, indices: np.ndarray) -> list[Tree]:
        """The elements at `indices`, in memory that may not be the caller's."""
        raise NotImplementedError


class Indexed(_Foreign):
    """Elements of a dataset that has them by position."""

    def __init__(self, data: Any, length: int | None) -> None:
        self.data, self.length = data, integer("len(data)", len(data), 0) if length is None else length
        self._many = callable(getattr(data, "__getitems__", None))

    def get(self, i: int, epoch: int) -> Tree:
        return tree.map(torch.clone, self._read(i))

    def _each(self, indices: np.ndarray) -> list[Tree]:
        places = indices.tolist()
        if not self._many:
            return [self._read(i) for i in places]
        try:
            items = self.data.__getitems__(places)
        except Exception as error:
            error.add_note(f"at positions {', '.join(map(str, places[:5]))}{' …' * (len(places) > 5)} of {_name(self.data)}")
            raise
        if len(items) != len(places):
            raise ArgumentError(f"{_name(self.data)}.__getitems__ gave {len(items)} items for {len(places)} positions")
        return [converted(item, i, self.data) for i, item in zip(places, items)]

    def _read(self, i: int) -> Tree:
        try:
            item = self.data[i]
        except Exception as error:
            error.add_note(f"at position {i} of {_name(self.data)}")
            raise
        return converted(item, i, self.data)

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "of": _name(self.data), "read": "many at once" if self._many else "one by one"}


class Iterated(_Foreign):
    """Items of an iteration, which is begun anew to go back."""

    def __init__(self, data: Any, begin: Callable[[], Iterable[Any]], length: int | None) -> None:
        self.data, self._begin = data, begin
        self.length = integer("len(data)", len(data), 0) if hasattr(data, "__len__") else length
        self._cursors: dict[int, _Cursor] = {}

    @property
    def ending(self) -> bool:
        return self.length is None

    def get(self, i: int, epoch: int) -> Tree:
        return self._cursor().read(i)

    def _each(self, indices: np.ndarray) -> list[Tree]:
        cursor = self._cursor()
        with cursor.lock:
            # In one pass, whatever their order.
            read = {place: cursor.read(place) for place in np.unique(indices).tolist()}
        return [read[place] for place in indices.tolist()]

    def _cursor(self) -> _Cursor:
        # An iteration does not cross a fork: what it reads from may be shared with the parent, as is the place in a file.
        pid = os.getpid()
        if pid not in self._cursors:
            if self._cursors and isinstance(self.data, Iterator):
                raise PositionError(f"{_name(self.data)} belongs to the process that began it: {_ANEW}")
            self._cursors.setdefault(pid, _Cursor(self.data, self._begin, self.length))
        return self._cursors[pid]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursors": {}}

    def facts(self) -> dict[str, str]:
        back = "cannot go back" if isinstance(self.data, Iterator) else "going back begins anew"
        return {**super().facts(), "of": _name(self.data), "read": f"one after the other; {back}"}


_ANEW = "give a function that begins it anew, ft.source(lambda: iterator)"


class _Cursor:
    """Where an iteration stands; threads take turns."""

    def __init__(self, data: Any, begin: Callable[[], Iterable[Any]], length: int | None) -> None:
        self.lock = threading.RLock()
        self._data, self._begin, self._length = data, begin, length
        # An iterable may give the same iterator again, and have it begin again, as a DataLoader with lasting workers does.
        self._renewing = isinstance(data, Iterable) and not isinstance(data, Iterator)
        self._items: Iterator[Any] | None = None
        self._before: Iterator[Any] | None = None
        self._next = 0
        self._ended: int | None = None

    def read(self, i: int) -> Tree:
        """Item i, converted and copied."""
        with self.lock:
            if self._ended is not None and i >= self._ended:
                raise self._over(i, self._ended)
            items = self._items if self._items is not None and i >= self._next else self._begun(i)
            while self._next < i:
                self._advance(items, i)
            # Copied before anybody goes on: a generator may fill the same array again.
            return tree.map(torch.clone, converted(self._advance(items, i), i, self._data))

    def _begun(self, wanted: int) -> Iterator[Any]:
        self._items = None
        try:
            items = iter(self._begin())
        except TypeError as error:
            raise ArgumentError(f"{_name(self._data)} does not begin an iteration: {error}") from error
        if items is self._before:
            raise PositionError(
                f"position {wanted} of {_name(self._data)} was passed: the iterator gave {self._next} items, and cannot begin "
                f"again; {_ANEW}"
            )
        self._items, self._before, self._next = items, None if self._renewing else items, 0
        return items

    def _advance(self, items: Iterator[Any], wanted: int) -> Any:
        place = self._next
        try:
            item = next(items)
        except StopIteration:
            self._items, self._ended = None, place
            raise self._over(wanted, place) from None
        except BaseException as error:
            # It has nothing more to give.
            self._items = None
            error.add_note(f"at position {place} of {_name(self._data)}")
            raise
        self._next = place + 1
        return item

    def _over(self, wanted: int, items: int) -> PositionError:
        promise = "its len()" if hasattr(self._data, "__len__") else "length="
        said = "items" if self._length is None else f"of the {self._length} items that {promise} promised"
        kind = EndedError if self._length is None else PositionError
        return kind(f"position {wanted} lies outside: {_name(self._data)} ended after {items} {said}")


def converted(item: Any, i: int, data: Any) -> Tree:
    """An item as a tree of tensors, which may share its memory; `TreeError` for what is none."""
    return tree.map(partial(_tensor, i, data), item)


def _tensor(i: int, data: Any, leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if isinstance(leaf, (bool, int, float, complex)):
        return torch.tensor(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)) and readable(leaf.dtype):
        return tensor(np.asarray(leaf))
    kind = f"{type(leaf).__name__} of {leaf.dtype}" if isinstance(leaf, (np.ndarray, np.generic)) else type(leaf).__name__
    raise TreeError(
        f"item {i} of {_name(data)} holds a {kind}: a source takes tensors, arrays and numbers, in dicts, lists and tuples. "
        "Convert it in the dataset (transform=…) or in a generator: ft.source(lambda: (convert(item) for item in data))"
    )


def _name(data: Any) -> str:
    return getattr(data, "__qualname__", None) or f"a {type(data).__name__}"


__all__ = ["Indexed", "Iterated", "source"]
