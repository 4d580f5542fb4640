"""Sequences of different lengths, filled up to one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.tree import Tree
from functrain.data.source import Source


class Padded(Source):
    """Elements `(tree of (size, …), mask (size,))`; see `Source.padded`."""

    ragged = False

    def __init__(self, source: Source, size: int, value: Any, cut: bool) -> None:
        # NumPy's numbers as Python's, whose class torch knows.
        value = value.item() if isinstance(value, np.number) else value
        if isinstance(value, bool) or not isinstance(value, (int, float, complex)):
            raise ArgumentError(f"value takes the number to fill up with, got {value!r}")
        if not isinstance(cut, bool):
            raise ArgumentError(f"cut takes True or False, got {cut!r}")
        self.source, self.inner, self.length = source, (source,), source.length
        self.size, self.value, self.cut = size, value, cut

    def get(self, i: int, epoch: int) -> Tree:
        return tree.map(lambda leaf: leaf[0], self._filled([self.source.get(i, epoch)]))

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        return self._filled(self.source.elements(indices, epoch))

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self.source.announce(indices, epoch)

    def _filled(self, elements: list[Tree]) -> Tree:
        if not tree.same_structure(*elements):
            other = next(other for other in elements if not tree.same_structure(elements[0], other))
            raise TreeError(f"padded takes elements of one structure: {tree.difference(elements[0], other)}")
        lengths = torch.tensor([self._length(element) for element in elements])
        longest = int(lengths.max())
        if longest > self.size and not self.cut:
            raise TreeError(f"an element has {longest} rows, and padded({self.size}) no room: give a larger size, or cut=True")
        names, structure = tree.paths(elements[0]), tree.structure(elements[0])
        columns = zip(*(tree.leaves(element) for element in elements))
        leaves = [self._column(name or "elements", column) for name, column in zip(names, columns)]
        return tree.unflatten(structure, leaves), torch.arange(self.size) < lengths[:, None]

    def _length(self, element: Tree) -> int:
        lengths = {name: len(leaf) for name, leaf in zip(tree.paths(element), tree.leaves(element)) if leaf.dim()}
        if not lengths:
            raise TreeError("padded takes sequences (T, …), and this element has none")
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name!r}: {length}" for name, length in lengths.items())
            raise TreeError(
                f"the leaves of an element differ in length ({listed}): padded fills up all of them. Take apart what is no "
                "sequence: source.map(lambda element: …), or two sources, one of them padded, joined by .zip"
            )
        return next(iter(lengths.values()))

    def _column(self, name: str, leaves: tuple[Tensor, ...]) -> Tensor:
        first = leaves[0]
        rest = first.shape[1:]
        if any(leaf.dtype != first.dtype or leaf.dim() != first.dim() or leaf.shape[1:] != rest for leaf in leaves):
            kinds = sorted({f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves})
            raise TreeError(f"leaf {name!r} differs in more than its length: it is {', '.join(kinds)}")
        if not first.dim():
            return torch.stack(leaves)
        filled = self._blank(name, first, (len(leaves), self.size, *rest))
        for place, leaf in enumerate(leaves):
            filled[place, : len(leaf)] = leaf[: self.size]
        return filled

    def _blank(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        try:
            blank = like.new_full(shape, self.value)
            exact = like.is_floating_point() or like.is_complex() or blank.view(-1)[0].item() == self.value
        except (RuntimeError, TypeError, OverflowError):
            exact = False
        if not exact:
            raise TreeError(f"leaf {name!r} of {str(like.dtype).removeprefix('torch.')} cannot hold the value {self.value!r}")
        return blank

    def facts(self) -> dict[str, str]:
        longer = "cut" if self.cut else "an error"
        return {**super().facts(), "padded": f"to {self.size} rows with {self.value}, longer ones are {longer}; with a mask"}
