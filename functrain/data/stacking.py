"""Elements put together: stacked one by one, or joined from parts that were read apart."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import TreeError
from functrain.core.tree import Tree

_DTYPE = operator.attrgetter("dtype")


def stacked(elements: list[Tree]) -> Tree:
    """Elements as one tree with a new first dimension; `TreeError` that says so where they do not fit together."""
    try:
        return tree.map(_column, *elements)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TreeError(
            f"elements of different shape, dtype or structure cannot be stacked: {error}. Make them alike with "
            ".padded(size) or .map(fn), or drop a ragged last batch with .batch(size, drop_last=True)"
        ) from error


def _column(*leaves: Tensor) -> Tensor:
    # torch promotes: 2⁴⁰ + 1 beside 1.5 would be a float32, and another number.
    column = torch.stack(leaves)
    dtypes = set(map(_DTYPE, leaves))
    if len(dtypes) > 1:
        listed = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"leaves are {listed}, and a dtype that holds both may round: choose one with .map(fn)")
    return column


def joined(size: int, parts: Iterable[tuple[str, np.ndarray, Tree]]) -> Tree:
    """One tree of `size` rows out of parts `(name, places, rows)`, at least one: row j of a part goes to `places[j]`,
    and places ascend.

    Raises `TreeError`, which names the parts, where they disagree in structure, dtype or shape.

    >>> joined(3, [("a", np.array([0, 2]), torch.tensor([10, 20])), ("b", np.array([1]), torch.tensor([30]))]).tolist()
    [10, 30, 20]
    """
    whole: Tree = None
    for name, places, part in parts:
        if whole is None:
            if len(places) == size:
                return part
            first, model = name, part
            whole = tree.map(lambda leaf: leaf.new_empty(size, *leaf.shape[1:]), part)
        # A join would change dtypes without a word.
        differ = disagreement(model, part)
        if differ:
            raise TreeError(
                f"the elements of {first} and {name} disagree ({differ}): make them alike with .map(fn), sequences of "
                "different lengths with .padded(size)"
            )
        for leaf, rows in zip(tree.leaves(whole), tree.leaves(part)):
            leaf.index_copy_(0, torch.from_numpy(places).to(leaf.device), rows)
    return whole


def disagreement(first: Tree, second: Tree) -> str:
    """Where rows of two trees differ in structure, dtype or shape, in words; nothing where they do not.

    >>> disagreement({"x": torch.zeros(2, 3)}, {"x": torch.zeros(5, 4)})
    'x: (3,) float32 and (4,) float32'
    """
    if not tree.same_structure(first, second):
        return tree.difference(first, second)
    pairs = zip(tree.paths(first), map(_kind, tree.leaves(first)), map(_kind, tree.leaves(second)))
    return ", ".join(f"{name or 'elements'}: {ours} and {theirs}" for name, ours, theirs in pairs if ours != theirs)


def _kind(leaf: torch.Tensor) -> str:
    return f"{tuple(leaf.shape[1:])} {str(leaf.dtype).removeprefix('torch.')}"
