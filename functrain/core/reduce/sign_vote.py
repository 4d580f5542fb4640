"""Majority vote: each part votes with the signs of its gradient, and the signs of the sums are the result.

signSGD with majority vote: sign(Σₖ sign(gₖ)), elementwise over the parts' gradients gₖ; a tie gives 0.

Every part has one vote, whatever its weight; a part whose weights sum to zero has gradient zero and abstains. The result's
elements are −1, 0 and 1, so the learning rate is the size of a step in every coordinate. A NaN is no vote: the result is
finite whatever a part holds (its loss is not: that is a mean). Merging adds signs: the memory of one gradient, whatever the
number of parts.

Source: Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with majority vote is communication efficient and fault
tolerant", ICLR 2019.

>>> import functrain as ft
>>> votes = ft.parallel(ft.grad(lambda w, batch: batch @ w), 3, ft.reduce.sign_vote)
>>> votes.finished(torch.zeros(3), torch.tensor([[9.0, -1.0, 2.0], [-1.0, -1.0, -2.0], [-1.0, -1.0, 0.0]])).grads
tensor([-1., -1.,  0.])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.reduce.base import Gradient, Reducer, add, mean_of
from functrain.core.tree import Tree


class Votes(NamedTuple):
    """Sums over parts: of loss, weight and aux (`total`, with a 0-d zero for each leaf of grads), and of signs (`votes`)."""

    total: Gradient
    votes: Tree


def signs(grads: Tree) -> Tree:
    """The sign of each element: −1, 0 or 1, as float32; NaN has no sign and gives 0.

    float32 counts to 2²⁴ parts exactly, whatever the gradients' dtype (bfloat16 stops at 256).

    >>> signs({"w": torch.tensor([-3.0, 0.0, 2.0, torch.nan])})
    {'w': tensor([-1.,  0.,  1.,  0.])}
    """
    # Of NaN, torch.sign gives 0 (NumPy's gives NaN).
    return tree.map(lambda leaf: leaf.sign().to(torch.float32), grads)


def lift(gradient: Gradient) -> Votes:
    """One part's vote. A mean has the sign of its sum, so nothing is divided."""
    # The zeros remember the leaves' dtypes, in the memory of one number each.
    return Votes(gradient._replace(grads=tree.map(_zero, gradient.grads)), signs(gradient.grads))


def finish(merged: Votes) -> Gradient:
    """The signs of the sums of signs; loss and aux are means."""
    grads = tree.map(lambda votes, zero: votes.sign().to(zero.dtype), merged.votes, merged.total.grads)
    return mean_of(merged.total)._replace(grads=grads)


def _zero(leaf: Tensor) -> Tensor:
    return leaf.new_zeros(())


sign_vote = Reducer("sign_vote", add, finish, lift)
