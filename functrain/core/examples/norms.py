"""Norms of single examples' gradients over all leaves, and the sums that are scaled by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.core.examples.contribution import Contribution, combined, exact, squared
from functrain.core.examples.linear import together
from functrain.core.reduce.base import visible


class Account(NamedTuple):
    """What is known of one leaf: its contributions, and the examples' gradients `(N, …)` where they were needed and kept."""

    leaf: Tensor
    uses: list[Contribution]
    grads: Tensor | None = None

    def scaled(self, scales: Tensor) -> Tensor:
        """Σᵢ sᵢ gᵢ, like the leaf."""
        if self.grads is not None:
            return combined(scales, self.grads).to(self.leaf.dtype)
        if not self.uses:
            return torch.zeros_like(self.leaf)
        first, *rest = (use.scaled(scales) for use in self.uses)
        return sum(rest, first).to(self.leaf.dtype)

    def rows(self, size: int) -> Tensor:
        """gᵢ of all examples: `(N, *leaf.shape)`."""
        return _each(self.uses, 0, size).to(self.leaf.dtype) if self.uses else self.leaf.new_zeros(size, *self.leaf.shape)


def accounts(leaves: list[Tensor], contributions: list[list[Contribution]]) -> list[Account]:
    """One account for each leaf."""
    return [Account(leaf, together(uses)) for leaf, uses in zip(leaves, contributions)]


def norms(open: list[Account], size: int, budget: int) -> tuple[Tensor, list[Account]]:
    """‖gᵢ‖ `(N,)` over all leaves together, and the accounts with what was kept for the sums to come.

    At most `budget` bytes of gradients of single examples are alive at once; what does not fit is computed in blocks
    of examples, and once more for the sums.
    """
    squares, closed = [], []
    for account in open:
        square, account = _square(account, size, budget)
        if account.grads is not None:
            budget -= account.grads.numel() * account.grads.element_size()
        closed.append(account)
        if square is not None:
            squares.append(square)
    if not squares:
        return torch.zeros(size, dtype=exact(open[0].leaf.dtype), device=open[0].leaf.device), closed
    if len({square.dtype for square in squares}) > 1:
        squares = [square.double() for square in squares]
    lengths = torch.stack(squares).sum(0).sqrt()
    if visible(lengths) and not bool(lengths.isfinite().all()):
        # The squares of finite numbers may not be finite.
        return _in_doubles(closed, size), closed
    return lengths, closed


def _in_doubles(closed: list[Account], size: int) -> Tensor:
    """The norms again, float64, one example's gradient at a time."""
    used = [account for account in closed if account.uses]
    rows = [
        sum(_each(account.uses, place, place + 1).double().square().sum() for account in used) for place in range(size)
    ]
    return torch.stack([torch.as_tensor(row) for row in rows]).sqrt()


def _square(account: Account, size: int, budget: int) -> tuple[Tensor | None, Account]:
    leaf, uses, _ = account
    if not uses:
        return None, account
    # The norm of a sum is no sum of norms: only a leaf that is used once has a shortcut.
    known = uses[0].squares() if len(uses) == 1 else None
    if known is not None:
        return known, account
    count = max(1, budget // max(1, uses[0].elements * leaf.element_size()))
    if count >= size:
        grads = _each(uses, 0, size)
        return squared(grads), account._replace(grads=grads)
    blocks = [squared(_each(uses, start, min(start + count, size))) for start in range(0, size, count)]
    return torch.cat(blocks), account


def _each(uses: list[Contribution], start: int, stop: int) -> Tensor:
    first, *rest = (use.each(start, stop) for use in uses)
    return sum(rest, first)
