"""The AND-mask: the mean gradient, kept where the parts agree on its sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.reduce.base import Gradient, Reducer, add, divided, mean_of
from functrain.core.reduce.sign_vote import signs
from functrain.core.tree import Tree


class Agreement(NamedTuple):
    """Sums over parts: of gradients, loss, weight and aux (`total`), of signs (`votes`), and of those who vote (`voters`)."""

    total: Gradient
    votes: Tree
    voters: Tensor


def and_mask(tau: float) -> Reducer:
    """The weighted mean gradient, with zeros where the parts agree less than `tau` on the sign.

    Elementwise, over the mean gradients gₖ of K parts: agreement = |Σₖ sign(gₖ)| / K, and the result is the mean over all
    examples where agreement ≥ τ, else 0. Every part has one vote, whatever its weight; a part whose weights sum to zero
    has no gradient, does not vote and is not counted. With τ = 0 it is the mean; with τ = 1 all parts have to agree.

    Merging adds gradients and signs: the memory of two gradients, whatever the number of parts. A NaN is no vote, but what
    is not finite in the mean is not hidden by the mask: there the result is NaN.

    Raises `ArgumentError` for τ outside [0, 1], `LossError` where all weights sum to zero.

    Source: Parascandolo, Neitz, Orvieto, Gresele, Schölkopf, "Learning explanations that are hard to vary", ICLR 2021.

    >>> import functrain as ft
    >>> batch = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    >>> masked = ft.parallel(ft.grad(lambda w, batch: batch @ w), 3, ft.reduce.and_mask(0.5))
    >>> masked.finished(torch.zeros(3), batch).grads
    tensor([ 1.,  0., -1.])
    """
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau <= 1:
        raise ArgumentError(
            f"and_mask(tau) needs a number in [0, 1], got {tau!r}: the share by which one sign has to outnumber the other, "
            "|positive − negative| / parts (0 keeps all, 1 asks for all parts to agree)"
        )

    def lift(gradient: Gradient) -> Agreement:
        return Agreement(gradient, signs(gradient.grads), (gradient.weight != 0).to(torch.float64))

    def finish(merged: Agreement) -> Gradient:
        mean = mean_of(merged.total)
        # Divided, not compared with τ · K: 11 votes of 20 agree by 0.55, and 0.55 · 20 is above 11.
        agreement = divided(merged.votes, merged.voters)
        kept = tree.map(lambda leaf, share: leaf * (share.abs() >= tau).to(leaf.dtype), mean.grads, agreement)
        return mean._replace(grads=kept)

    return Reducer(f"and_mask({tau:g})", add, finish, lift, copies=2)
