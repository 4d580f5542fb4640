"""The law of batch-mates: a prediction does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from functrain.core import random, tree
from functrain.core.errors import ArgumentError
from functrain.core.explain import explain
from functrain.core.tree import Tree
from functrain.testing.comparing import equal


def check_batch_mates(predict: Callable[[Tree], Tree], batch: Tree, *, seed: int = 0) -> None:
    """Check that `predict(batch)`, leaves `(N, …)`, gives each example the same whatever else is in its batch.

    Each example by itself, the batch in another order, the batch cut in two, and among mates whose numbers are a thousand
    times as large, equals its row in the whole, up to rounding. Batch norm in training breaks it, and so does a model that
    mixes examples up (a reshape or a mean over the wrong dimension).

    Raises `LawError` with the counter-example, `ArgumentError` for a batch of one, which has no mates.

    >>> check_batch_mates(lambda x: x.softmax(1), torch.rand(5, 3))
    """
    size = tree.batch_size(batch)
    if size < 2:
        raise ArgumentError(f"a batch of {size} has no batch-mates: give at least two examples")
    name = f"{explain(predict).title}: a prediction does not depend on its batch-mates"
    whole = predict(batch)
    order = random.bits(random.key(seed), (size,)).argsort()
    equal(f"{name}, in another order", predict(_rows(batch, order)), _rows(whole, order))
    cut = tree.divide(batch, 2)
    equal(f"{name}, cut in two", tree.concat([predict(part) for part in cut]), whole)
    for place in sorted({0, size // 2, size - 1}):
        only = torch.tensor([place])
        equal(f"{name}, example {place} by itself", predict(_rows(batch, only)), _rows(whole, only))
        loud = tree.map(lambda leaf, place=place: _loud(leaf, place), batch)
        equal(f"{name}, example {place} among loud ones", _rows(predict(loud), only), _rows(whole, only))


def _rows(values: Tree, places: torch.Tensor) -> Tree:
    return tree.map(lambda leaf: leaf[places], values)


def _loud(leaf: torch.Tensor, place: int) -> torch.Tensor:
    if not leaf.is_floating_point():
        return leaf
    mates = leaf * 1000
    mates[place] = leaf[place]
    return mates
