"""Gradients of a matrix that multiplies activations: xᵢ ↦ W xᵢ, at one position or at many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from functrain.core.examples.contribution import SHIFT, Contribution, Rows, exact, lengths, weighted
from functrain.core.examples.tape import Leaf, Make, Tape

# What writing and reading one number of a gradient costs, in multiplications: so much dearer is an example's own gradient.
TRAFFIC = 16


class Linear(Contribution):
    """A matrix that maps inputs x `(N, L, I)` to outputs with gradients δ `(N, L, O)`: gᵢ = Σₗ aᵢₗ bᵢₗᵀ.

    For a leaf `(O, I)`, a is δ and b is x; for one `(I, O)` (x @ W), a is x and b is δ.

    With one position, ‖gᵢ‖ = ‖aᵢ‖ ‖bᵢ‖: no gradient of an example is ever computed (Goodfellow 2015). With L of them,
    ‖gᵢ‖² = Σₖₗ (aᵢₖ·aᵢₗ)(bᵢₖ·bᵢₗ) costs L² (I + O) (Li et al. 2021), the gradients themselves L I O and their memory: whichever
    is cheaper. Scaled sums take one product over all examples and positions, as a batch's gradient does (Bu et al. 2022).

    Sources: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Li et al., "Large language models can
    be strong differentially private learners", arXiv 2110.05679; Bu et al., "Differentially private optimization on large
    model at small cost", arXiv 2210.00038.
    """

    def __init__(self, left: Tensor, right: Tensor, size: int) -> None:
        if left.dtype != right.dtype:
            # Under autocast an input may be wider than the product that it went into.
            narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
            left, right = left.to(narrow), right.to(narrow)
        # Rows by example and position, `(N L, ·)`: views are not for nothing where layers are small.
        self.left, self.right, self.size = left, right, size
        self.positions, self.elements = len(left) // size, left.shape[1] * right.shape[1]
        self.algebra = f"linear: {norms_by(*self._shape())}"

    def each(self, start: int, stop: int) -> Tensor:
        left, right = (side[start:stop] for side in self.sides())
        return left.mT * right if self.positions == 1 else torch.bmm(left.mT, right)

    def norms(self) -> Tensor | None:
        if self.positions == 1:
            return lengths(self.left) * lengths(self.right)
        return gram(*self.sides()) if gram_pays(*self._shape()) else None

    def scaled(self, scales: Tensor) -> Tensor:
        left, right = self.left, self.right
        scales = scales if self.positions == 1 else scales.repeat_interleave(self.positions)
        if left.shape[1] <= right.shape[1]:
            left = weighted(scales, left)
        else:
            right = weighted(scales, right)
        return left.t() @ right

    def sides(self) -> tuple[Tensor, Tensor]:
        """a `(N, L, ·)` and b `(N, L, ·)`."""
        shape = self.size, self.positions, -1
        return self.left.view(shape), self.right.view(shape)

    def _shape(self) -> tuple[int, int, int]:
        return self.positions, self.left.shape[1], self.right.shape[1]


def together(uses: list[Contribution]) -> list[Contribution]:
    """Uses of one leaf, those as a matrix joined into one over all their positions (a cell that is applied T times)."""
    if len(uses) == 1:
        return uses
    linear = [use for use in uses if isinstance(use, Linear)]
    if len(linear) < 2 or len({use.left.dtype for use in linear}) > 1:
        return uses
    left, right = (torch.cat(sides, 1).flatten(0, 1) for sides in zip(*(use.sides() for use in linear)))
    return [Linear(left, right, linear[0].size), *(use for use in uses if not isinstance(use, Linear))]


def gram_pays(positions: int, wide: int, high: int) -> bool:
    """Whether products of all pairs of positions are cheaper than the gradient of an example, `(high, wide)`."""
    return positions * positions * (wide + high) < wide * high * TRAFFIC


def gram(left: Tensor, right: Tensor) -> Tensor:
    """‖Σₗ aᵢₗ bᵢₗᵀ‖ `(N,)` of a `(N, L, I)` and b `(N, L, O)`."""
    left, right = left.to(exact(left.dtype)), right.to(exact(right.dtype))
    pairs = torch.bmm(left, left.mT) * torch.bmm(right, right.mT)
    # Rounding may leave the square of a zero norm below zero.
    return pairs.sum((1, 2)).clamp_min(0).sqrt()


def norms_by(positions: int, wide: int, high: int) -> str:
    """The algebra of the norms, in words."""
    if positions == 1:
        return "norms from activations and output gradients"
    if gram_pays(positions, wide, high):
        return f"norms from products of {positions} × {positions} positions"
    return f"a gradient for each example, summed over {positions} positions"


# --- rules ----------------------------------------------------------------------------------------------------------


def linear(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """x Wᵀ + b of a leaf W."""
    return _linear(tape, *args, **kwargs)


def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    leaf = tape.leaf(weight)
    if leaf is None or leaf.value.ndim != 2 or tape.known(input) or _broadcast(tape, bias, leaf):
        return None
    return _product(tape, input, leaf, bias)


def _broadcast(tape: Tape, bias: Any, leaf: Leaf) -> bool:
    """Whether a bias is a leaf that outputs share otherwise than one number each: autograd then tells what is whose."""
    return tape.known(bias) is not None and bias.shape != leaf.value.shape[:1]


def matmul(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """x W or W x of a leaf W."""
    if kwargs or len(args) != 2 or not all(isinstance(side, Tensor) for side in args):
        return None
    left, right = args
    first, second = tape.leaf(left), tape.leaf(right)
    leaf = first or second
    if leaf is None or leaf.value.ndim != 2 or (tape.known(left) and tape.known(right)):
        return None
    if first is None:
        return _product(tape, left, leaf.transposed())
    return _product(tape, right, leaf) if right.ndim == 1 else tape.laid(_product(tape, right.mT, leaf).mT)


def reversed_matmul(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """The same, with the sides the other way round."""
    return matmul(tape, func, args[::-1], kwargs)


def addmm(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """b + x W of a leaf W."""
    leaf = tape.leaf(args[2]) if len(args) == 3 and not kwargs else None
    if leaf is None or tape.known(args[1]) or args[0].ndim != 1 or _broadcast(tape, args[0], leaf.transposed()):
        return None
    return _product(tape, args[1], leaf.transposed(), args[0])


def _product(tape: Tape, input: Tensor, leaf: Leaf, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, recorded, for a leaf W `(O, I)`."""
    shift = tape.leaf(bias)
    x = tape.physical(input)
    # A matrix of examples and positions: the product is no view, and takes the shortest way through torch.
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, leaf.of(flat), None if shift is None else shift.value)
    size = len(x)

    def matrix(x: Tensor, grad: Tensor) -> Contribution:
        return Linear(x, grad, size) if leaf.flipped else Linear(grad, x, size)

    makes: list[tuple[int, Make]] = [(leaf.place, matrix)]
    if shift is not None:
        makes.append((shift.place, lambda x, grad: Rows(_shifts(grad, size), SHIFT)))
    done = tape.record(flat, y, makes, (*x.shape[:-1], y.shape[1]))
    return done if bias is None or shift is not None else done + bias


def _shifts(grad: Tensor, size: int) -> Tensor:
    return grad if len(grad) == size else grad.view(size, -1, grad.shape[1]).sum(1)
