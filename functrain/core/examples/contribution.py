"""What one use of a parameter adds to every example's gradient, and the sums over examples that follow from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHIFT = "shift: a gradient for each example, sums of output gradients"


class Contribution:
    """One use of a leaf of params by N examples: `gᵢ`, its gradient for each of them, in whatever form is cheapest to keep.

    - `algebra`: in words, how norms and sums are found: for `plan_of`;
    - `elements`: how many numbers one example's gradient takes.
    """

    algebra: str
    elements: int

    def each(self, start: int, stop: int) -> Tensor:
        """The gradients of the examples from start to stop: `(n, *leaf.shape)`."""
        raise NotImplementedError

    def norms(self) -> Tensor | None:
        """‖gᵢ‖ of every example `(N,)` where there is a way without the gradients themselves that is cheaper; else None."""
        return None

    def scaled(self, scales: Tensor) -> Tensor:
        """Σᵢ sᵢ gᵢ, like the leaf, for scales `(N,)`."""
        raise NotImplementedError


class Rows(Contribution):
    """Gradients of the examples that are there already, `(N, *leaf.shape)`: small, or told apart by autograd."""

    def __init__(self, grads: Tensor, algebra: str) -> None:
        self.grads, self.algebra = grads, algebra
        self.elements = math.prod(grads.shape[1:])

    def each(self, start: int, stop: int) -> Tensor:
        return self.grads[start:stop]

    def scaled(self, scales: Tensor) -> Tensor:
        return combined(scales, self.grads)


def combined(scales: Tensor, grads: Tensor) -> Tensor:
    """Σᵢ sᵢ gᵢ of gradients `(N, …)` that are there, in their dtype; summed in float32 at least."""
    dtype = exact(grads.dtype)
    if grads.ndim == 2 and grads.dtype == dtype:
        return scales.to(dtype) @ grads
    rows, order = _dense(grads)
    total = (scales.to(dtype) @ rows.reshape(len(rows), -1).to(dtype)).view(rows.shape[1:])
    back = [order.index(dim) for dim in range(1, grads.ndim)]
    return total.permute(back).to(grads.dtype, memory_format=torch.contiguous_format)


def weighted(scales: Tensor, values: Tensor) -> Tensor:
    """sᵢ vᵢ of values `(N, …)`, in their dtype; a scale that was itself rounded to a short dtype would miss its norm."""
    return (values * scales.to(exact(values.dtype)).view(-1, *(1,) * (values.ndim - 1))).to(values.dtype)


def lengths(grads: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """‖gᵢ‖ `(N,)` of gradients `(N, …)` that are there: by default in float32 at least."""
    rows = grads if grads.ndim == 2 else _dense(grads)[0]
    return torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1, dtype=dtype or exact(grads.dtype))


def overall(norms: list[Tensor]) -> Tensor:
    """‖gᵢ‖ `(N,)` over all leaves, of the norms over each, in the widest of their dtypes."""
    if len({norm.dtype for norm in norms}) > 1:
        norms = [norm.double() for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _dense(grads: Tensor) -> tuple[Tensor, list[int]]:
    """Gradients `(N, …)` with their dimensions in the order in which they lie in memory, so that rows need no copy."""
    order = sorted(range(1, grads.ndim), key=grads.stride, reverse=True)
    return grads.permute(0, *order), order


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over values of `dtype` are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def summed(grads: Tensor) -> Tensor:
    """The sum over positions of `(N, L, …)`."""
    return grads.squeeze(1) if grads.shape[1] == 1 else grads.sum(1)
