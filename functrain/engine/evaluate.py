"""A measure over a whole source: sums over batches, divided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functrain.core import loss as losses
from functrain.core import random, reduce, tree
from functrain.core.deferred import drawn
from functrain.core.errors import ArgumentError
from functrain.core.grad import checked_size
from functrain.core.reduce.base import checked_weight
from functrain.core.tree import Tree
from functrain.data.source import Source


def evaluate(loss: Callable[..., Any], params: Tree, source: Any, *, carry: Tree = None, seed: int = 0) -> dict[str, float]:
    """The mean of a loss and of its `aux` measures over one epoch of batches, without gradients.

    Right for ragged batches and weights: Σ w·loss / Σ w over all examples, never a mean of means. A loss that declares
    `carry` gets the same one for each batch; one that declares `key` gets that of `seed` and the batch's position.

    - `source`: a finite source of batches, or any iterable of them;
    - returns `{"loss": …, **aux}` as floats (an aux measure called `loss` or `weight` as `aux.loss`, `aux.weight`).

    What is evaluated is the loss as it is given: for batch norm and dropout write it with `apply.eval()`.

    >>> import functrain as ft
    >>> loss = lambda params, batch: ft.Losses((batch - params) ** 2, aux={"error": (batch - params).abs()})
    >>> evaluate(loss, torch.tensor(1.0), ft.arrays(torch.tensor([0.0, 1.0, 3.0])).batch(2))
    {'loss': 1.6666666666666667, 'error': 1.0}
    """
    if isinstance(source, Source) and source.length is None:
        raise ArgumentError("the source has no end: evaluate over a finite one")
    uses = losses.declared(loss)
    key = random.key(seed)
    total = None
    with torch.no_grad():
        for position, batch in enumerate(source):
            batch = drawn(batch)
            size = checked_size(batch)
            keys = random.example_keys(random.fold_in(key, position), size) if "key" in uses else None
            losses.missing(uses, carry, keys)
            sums = losses.total(loss, uses, params, batch, size, carry, keys)
            # Sums over many batches outgrow float32.
            doubled = tree.map(torch.Tensor.double, (sums.loss, sums.weight, sums.aux))
            total = reduce.add(total, doubled)
    if total is None:
        raise ArgumentError("the source has no batches to evaluate on")
    loss_sum, weight, aux = total
    checked_weight(weight)
    means = {"loss": loss_sum, **losses.measures(aux)}
    return {name: (value / weight).item() for name, value in means.items()}
