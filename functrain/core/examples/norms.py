"""Norms of single examples' gradients over all leaves, and the sums that are scaled by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.core.examples.contribution import Contribution, combined, exact, lengths, overall
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
    found, closed = [], []
    for account in open:
        norm, account = _norm(account, size, budget)
        if account.grads is not None:
            budget -= account.grads.numel() * account.grads.element_size()
        closed.append(account)
        if norm is not None:
            found.append(norm)
    if not found:
        return torch.zeros(size, dtype=exact(open[0].leaf.dtype), device=open[0].leaf.device), closed
    total = overall(found)
    if visible(total) and not bool(total.isfinite().all()):
        # The squares of finite numbers may not be finite.
        return _in_doubles(closed, size), closed
    return total, closed


def _in_doubles(closed: list[Account], size: int) -> Tensor:
    """The norms again, float64, one example's gradient at a time."""
    used = [account for account in closed if account.uses]
    rows = [sum(_each(account.uses, place, place + 1).double().square().sum() for account in used) for place in range(size)]
    return torch.stack([torch.as_tensor(row) for row in rows]).sqrt()


def _norm(account: Account, size: int, budget: int) -> tuple[Tensor | None, Account]:
    leaf, uses, _ = account
    if not uses:
        return None, account
    # The norm of a sum is no sum of norms: only a leaf that is used once has a shortcut.
    known = uses[0].norms() if len(uses) == 1 else None
    if known is not None:
        return known, account
    count = max(1, budget // max(1, uses[0].elements * leaf.element_size()))
    if count >= size:
        grads = _each(uses, 0, size)
        return lengths(grads), account._replace(grads=grads)
    blocks = [lengths(_each(uses, start, min(start + count, size))) for start in range(0, size, count)]
    return torch.cat(blocks), account


def _each(uses: list[Contribution], start: int, stop: int) -> Tensor:
    first, *rest = (use.each(start, stop) for use in uses)
    return sum(rest, first)
