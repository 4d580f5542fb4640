"""Adaptive summation: gradients that are orthogonal are added, parallel ones averaged, and what lies between in between.

Adasum of the parts' mean gradients, in pairs up the fixed binary tree:

    adasum(a, b) = (1 − ⟨a, b⟩ / 2‖a‖²) a + (1 − ⟨a, b⟩ / 2‖b‖²) b

with inner products over all leaves together. Orthogonal gradients are added (K times their mean), equal ones
averaged, and a gradient of zero changes nothing. Every part counts once, whatever its weight; loss and aux are weighted means.

The rule is not associative, so it is no monoid's merge: merging gathers the parts (the free monoid), and the rule is folded
up the tree at the end, where association depends on the number of parts alone. A NaN in one part is in the result.

Source: Maleki, Musuvathi, Mytkowicz, Saarikivi, Xu, Eksarevskiy, Ekanayake, Barsoum, "Scaling distributed training with
adaptive summation", MLSys 2021.

>>> import functrain as ft
>>> adaptive = ft.parallel(ft.grad(lambda w, batch: batch @ w), 2, ft.reduce.adasum)
>>> adaptive.finished(torch.zeros(2), torch.eye(2)).grads, adaptive.finished(torch.zeros(2), torch.ones(2, 2)).grads
(tensor([1., 1.]), tensor([1., 1.]))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.reduce.gathered import gathered, inner_products, select
from functrain.core.tree import Tree


def combine(rows: Sequence[Tree], weights: Tensor) -> Tree:
    """The rows folded in pairs up the one fixed tree."""
    return tree.tree_reduce(pair, rows)


def pair(a: Tree, b: Tree) -> Tree:
    """(1 − ⟨a, b⟩ / 2‖a‖²) a + (1 − ⟨a, b⟩ / 2‖b‖²) b.

    >>> pair({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 2.0])})
    {'w': tensor([1.4000, 1.8000])}
    """
    products = inner_products([a, b])
    squares = torch.stack([products[0, 0], products[1, 1]])
    # Of a zero gradient nothing is shared with the other: 0 / 0 stands for 0.
    safe = torch.where(squares > 0, squares, torch.ones_like(squares))
    return select([a, b], 1 - products[0, 1] / (2 * safe))


adasum = gathered("adasum", combine, stacked=False)
