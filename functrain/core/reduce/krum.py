"""The part that the other parts agree with most, and the mean of the few that they agree with most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, LossError
from functrain.core.reduce.base import Reducer
from functrain.core.reduce.gathered import gathered, select, squared_distances
from functrain.core.tree import Tree


def krum(corrupt: int) -> Reducer:
    """The mean gradient of one part: of the one closest to its K − f − 2 nearest others, f = `corrupt`.

    Part k scores Σ ‖gₖ − gⱼ‖² over its K − f − 2 nearest others j, over all leaves together; the lowest score is taken, the
    first of equals. Weights of parts do not matter. Loss and aux are weighted means over the parts whose loss is finite.

    It survives f corrupt parts of K ≥ 2f + 3: one that is far from all others is never taken. A part whose gradient is not
    finite, or so large that squared distances are not, is infinitely far from all, and so never taken while at
    least K − f are finite; with fewer the result is NaN.

    Raises `ArgumentError` for a number of corrupt parts that is not an int of at least 0, and, when it is used, `LossError` for
    fewer than 2f + 3 parts.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries: Byzantine tolerant gradient descent",
    NeurIPS 2017.

    >>> import functrain as ft
    >>> robust = ft.parallel(ft.grad(lambda w, batch: batch @ w), 5, ft.reduce.krum(1))
    >>> robust.finished(torch.zeros(1), torch.tensor([[1.0], [4.0], [2.0], [torch.nan], [3.0]])).grads
    tensor([2.])
    """
    return _best("krum", corrupt, 1)


def multi_krum(corrupt: int, keep: int | None = None) -> Reducer:
    """The mean over the `keep` parts of the lowest scores, weighted by their weights; the scores are those of `krum`.

    `keep`: default K − f, all but as many as may be corrupt. More parts make less noise: with `keep` = 1 it is `krum`.

    Raises as `krum` does, and `ArgumentError` for a `keep` that is not an int of at least 1; when it is used, `LossError` for a
    `keep` above K − f.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries: Byzantine tolerant gradient descent",
    NeurIPS 2017.

    >>> import functrain as ft
    >>> robust = ft.parallel(ft.grad(lambda w, batch: batch @ w), 5, ft.reduce.multi_krum(1))
    >>> robust.finished(torch.zeros(1), torch.tensor([[1.0], [4.0], [2.0], [torch.nan], [3.0]])).grads
    tensor([2.5000])
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ArgumentError(f"multi_krum(corrupt, keep=) needs an int of at least 1, or None for K − corrupt, got {keep!r}")
    return _best("multi_krum", corrupt, keep)


def _best(kind: str, corrupt: int, keep: int | None) -> Reducer:
    if isinstance(corrupt, bool) or not isinstance(corrupt, int) or corrupt < 0:
        raise ArgumentError(f"{kind}(corrupt) needs how many parts may be corrupt, an int of at least 0, got {corrupt!r}")
    name = f"{kind}({corrupt})" if kind == "krum" or keep is None else f"{kind}({corrupt}, keep={keep})"

    def combine(rows: Sequence[Tree], weights: Tensor) -> Tree:
        count = len(rows)
        kept = count - corrupt if keep is None else keep
        if count < 2 * corrupt + 3:
            raise LossError(
                f"{name} needs at least 2 · {corrupt} + 3 = {2 * corrupt + 3} parts to tell {corrupt} corrupt ones from the "
                f"others, and there are {count}: take more parts, batches of as many examples, or fewer corrupt parts"
            )
        if kept > count - corrupt:
            raise LossError(
                f"{name} keeps {kept} of {count} parts, of which {corrupt} may be corrupt: keep at most {count - corrupt}"
            )
        return select(rows, _shares(scores(squared_distances(rows), corrupt), weights, kept))

    return gathered(name, combine, stacked=False, robust=True, least=2 * corrupt + 3)


def scores(squared: Tensor, corrupt: int) -> Tensor:
    """The sum of the K − f − 2 smallest squared distances of each part to others: `(K,)`, of all of them `(K, K)`.

    >>> places = torch.tensor([0.0, 1.0, 3.0, 6.0])
    >>> scores((places - places.unsqueeze(1)) ** 2, 0)
    tensor([10.,  5., 13., 34.])
    """
    count = len(squared)
    itself = torch.eye(count, dtype=torch.bool, device=squared.device)
    far = torch.where((squared < torch.inf) & ~itself, squared, torch.inf)
    return far.sort(dim=1).values[:, : count - corrupt - 2].sum(1)


def _shares(scores: Tensor, weights: Tensor, keep: int) -> Tensor:
    ranks = scores.argsort(stable=True).argsort()
    kept = torch.where(ranks < keep, weights, 0.0)
    # Among infinite scores there is nothing to choose by.
    known = torch.where(ranks < keep, scores, 0.0).sum() < torch.inf
    return torch.where(known | (kept == 0), kept / kept.sum(), torch.nan)
