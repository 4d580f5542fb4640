"""Gradient surgery: each part is a task, and tasks that conflict are projected off each other.

PCGrad over tasks: the parts of the batch, so sort the batch by task and take as many parts as there are tasks.

With gₖ the mean gradient of part k: for every task i, v ← gᵢ, and for every other task j, in an order that is drawn by the key,

    v ← v − (⟨v, gⱼ⟩ / ‖gⱼ‖²) gⱼ    where ⟨v, gⱼ⟩ < 0,

against the original gⱼ; inner products are over all leaves together. The result is the mean of the K vectors v, each task
counted once, whatever its weight. (The paper takes their sum; with the mean, learning rates carry over from `reduce.mean`, and
where no two tasks conflict and all weigh the same, it is their mean.)

A projected gradient is a combination of the original ones, so the inner products are taken once, O(K² P) for P parameters, and
the projections are arithmetic on K × K numbers. Keyed: it needs `key=`, which a step gives it, another at each position. A NaN
in one part is in the result; no inner product is known then, and nothing is projected.

Source: Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient surgery for multi-task learning", NeurIPS 2020.

>>> import functrain as ft
>>> surgery = ft.parallel(ft.grad(lambda w, batch: batch @ w), 2, ft.reduce.pcgrad)
>>> surgery.finished(torch.zeros(2), torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), key=ft.random.key(0)).grads
tensor([0.2500, 0.7500])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core import random
from functrain.core.reduce.gathered import gathered, inner_products, select
from functrain.core.tree import Tree


def combine(rows: Sequence[Tree], weights: Tensor, key: Tensor) -> Tree:
    """The mean of the tasks' gradients, each projected off those that it conflicts with."""
    count = len(rows)
    orders = random.uniform(key, (count, count), torch.float64).argsort(dim=1, stable=True)
    # No share is zero: a task counts itself, and what is projected off it comes on top.
    return select(rows, _projected(inner_products(rows), orders).mean(0))


def _projected(gram: Tensor, orders: Tensor) -> Tensor:
    """Cᵢₖ: the projected gradient of task i is Σₖ Cᵢₖ gₖ, a combination of the original ones. All `(K, K)`.

    Task i meets the others in the order `orders[i]`; every inner product it needs is one of the Gram matrix's.
    """
    tasks = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    places = torch.arange(len(gram), device=gram.device)
    squares = gram[places, places]
    safe = torch.where(squares > 0, squares, torch.ones_like(squares))
    coefficients = tasks
    for others in orders.unbind(1):
        products = (coefficients * gram[others]).sum(1)
        conflict = (products < 0) & (others != places)
        removed = torch.where(conflict, products / safe[others], torch.zeros_like(products))
        coefficients = coefficients - removed.unsqueeze(1) * tasks[others]
    return coefficients


pcgrad = gathered("pcgrad", combine, keyed=True, stacked=False)
