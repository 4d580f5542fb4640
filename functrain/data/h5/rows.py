"""The rows of datasets of one file, or of one group in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from functrain.core import tree
from functrain.core.errors import DataError
from functrain.core.tree import Tree
from functrain.data.h5.choose import Choice
from functrain.data.h5.columns import kind
from functrain.data.h5.shelf import FileSource, Shelf
from functrain.data.rows import selection
from functrain.data.runs import Runs


class HDF5(FileSource):
    """Element i is `{name: row i}`, or the bare row where a dataset was chosen."""

    def __init__(self, choice: Choice, shelf: Shelf) -> None:
        self._choice, self._shelf = choice, shelf
        self.path, self.group = choice.path, choice.group
        self.length = choice.length
        self._ragged = any(column.ragged for _, column in choice.columns.values())

    def open(self) -> None:
        """Open the file and try its readers now, not when the first row is read."""
        file = self._shelf.file(self.path)
        for layout in self._choice.layouts.values():
            file.reader(layout)

    @property
    def ragged(self) -> bool:
        return self._ragged

    @property
    def sequences(self) -> bool:
        return any(column.sequences for _, column in self._choice.columns.values())

    def get(self, i: int, epoch: int) -> Tree:
        return tree.map(lambda leaf: leaf[0], self.take(np.array([i]), epoch))

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        rows = self._read(indices)
        return self._choice.element({key: column.tensors(rows[name]) for key, (name, column) in self._choice.columns.items()})

    def elements(self, indices: np.ndarray, epoch: int) -> list[Tree]:
        rows = self._read(indices)
        each: dict[str, list[Any]] = {}
        for key, (name, column) in self._choice.columns.items():
            each[key] = column.each(rows[name]) if column.ragged else tree.unstack(column.tensors(rows[name]))
        return [self._choice.element(dict(zip(each, leaves))) for leaves in zip(*each.values())]

    def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        where = selection(indices, len(self))
        file = self._shelf.file(self.path)
        try:
            return {name: file.reader(layout).rows(where) for name, layout in self._choice.layouts.items()}
        except DataError as error:
            # Closed by another thread meanwhile, which looks like damage from within.
            if self._shelf.closed:
                raise DataError(f"the source over {self.path!r} was closed while it was read") from error
            raise

    @property
    def heeding(self) -> bool:
        # What is announced is decoded by threads, of which there are none where the caller is the only one.
        return self._shelf.threads > 1 and any(layout.decoded for layout in self._choice.layouts.values())

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        file = self._shelf.file(self.path)
        for layout in self._choice.layouts.values():
            file.reader(layout).announce(indices)

    def runs(self) -> Runs | None:
        file = self._shelf.file(self.path)
        layouts = self._choice.layouts.values()
        step = max(file.reader(layout).run for layout in layouts)
        size = sum(layout.size // layout.length for layout in layouts)
        return Runs(((len(self), step),), max(1, size)) if step > 1 else None

    def facts(self) -> dict[str, str]:
        where = {"file": self.path, **({"group": self.group} if self.group else {})}
        return {**where, **super().facts(), **{key or "elements": self._text(key) for key in self._choice.columns}}

    def _text(self, key: str) -> str:
        name, column = self._choice.columns[key]
        layout = self._choice.layouts[name]
        if not self._shelf.closed:
            # Its reader may have found another way.
            layout = self._shelf.file(self.path).reader(layout).layout
        packed = ", packed: unpack=True gives what the numbers stand for" if key in self._choice.packed else ""
        return f"{str(layout).replace(str(layout.dtype), kind(layout.dtype), 1)}{column}{packed}"
