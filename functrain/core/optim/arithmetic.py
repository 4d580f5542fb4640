"""The arithmetic of update rules, twice: on one leaf as a pure function, and on all leaves at once in place.

A rule is written once, in operations named as torch names them. Those that end in `_` may take their first argument's
memory over: `Pure` never does, `InPlace` does. A rule must therefore use that argument's result, not the argument, from
there on, and leave gradients as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Leaf = Any
"""A tensor (`Pure`), or a list of tensors, one a leaf (`InPlace`)."""
Number = Any
"""A 0-d tensor (`Pure`), or a float (`InPlace`)."""


class Pure:
    """Arithmetic on one leaf: new tensors, nothing changed; can be vmapped, differentiated and compiled.

    `update` is what `descend` and its like have added up to: the change of the parameter.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.update: Tensor | None = None

    def _moved(self, by: Tensor) -> None:
        self.update = by if self.update is None else self.update + by

    def decay(self, rate: Number) -> None:
        """p ← p − rate · p."""
        self._moved(-rate * self.param)

    def descend(self, direction: Leaf, rate: Number) -> None:
        """p ← p − rate · direction."""
        self._moved(-rate * direction)

    def descend_ratio(self, numerator: Leaf, denominator: Leaf, rate: Number) -> None:
        """p ← p − rate · numerator / denominator."""
        self._moved(-rate * numerator / denominator)

    def move_to(self, place: Leaf) -> None:
        """p ← place."""
        self.update = place - self.param

    def mul_(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x · y."""
        return x * y

    def mul(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x · y."""
        return x * y

    def div_(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x / y."""
        return x / y

    def div(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x / y."""
        return x / y

    def shift_(self, x: Leaf, by: Number) -> Leaf:
        """x + by, for a number."""
        return x + by

    def shift(self, x: Leaf, by: Number) -> Leaf:
        """x + by, for a number."""
        return x + by

    def add_(self, x: Leaf, y: Leaf, times: Number = 1) -> Leaf:
        """x + times · y."""
        return x + y if _is_one(times) else x + times * y

    def add(self, x: Leaf, y: Leaf, times: Number = 1) -> Leaf:
        """x + times · y."""
        return self.add_(x, y, times)

    def lerp_(self, x: Leaf, y: Leaf, share: Number) -> Leaf:
        """x + share · (y − x)."""
        return x + share * (y - x)

    def lerp(self, x: Leaf, y: Leaf, share: Number) -> Leaf:
        """x + share · (y − x)."""
        return self.lerp_(x, y, share)

    def addcmul_(self, x: Leaf, y: Leaf, z: Leaf, times: Number = 1) -> Leaf:
        """x + times · y · z."""
        return x + (y * z if _is_one(times) else times * y * z)

    def addcdiv_(self, x: Leaf, y: Leaf, z: Leaf, times: Number = 1) -> Leaf:
        """x + times · y / z."""
        return x + (y / z if _is_one(times) else times * y / z)

    def maximum_(self, x: Leaf, y: Leaf) -> Leaf:
        """The larger of both, element by element."""
        return torch.maximum(x, y)

    def clamp_min_(self, x: Leaf, low: Leaf | Number) -> Leaf:
        """The larger of x and `low`, a number a leaf; NaN stays."""
        return torch.maximum(x, low.to(x.dtype)) if isinstance(low, Tensor) else x.clamp(min=low)

    def sqrt(self, x: Leaf) -> Leaf:
        """√x, with a derivative of 0 at 0: differentiated through, a gradient that is 0 would give 0 · ∞ otherwise."""
        positive = x > 0
        return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), x)

    def sqrt_(self, x: Leaf) -> Leaf:
        """√x, with a derivative of 0 at 0."""
        return self.sqrt(x)

    def sqrt_into(self, memory: Leaf, x: Leaf) -> Leaf:
        """√x, with a derivative of 0 at 0; `memory` is free to be overwritten."""
        return self.sqrt(x)

    def rsqrt_(self, x: Leaf) -> Leaf:
        """1 / √x, for x above 0."""
        return x.rsqrt()

    def norm(self, x: Leaf) -> Leaf:
        """√Σx², a number a leaf, with a derivative of 0 at 0."""
        return self.sqrt(x.square().sum())

    def mean_square(self, leaf: Tensor, dim: int) -> Tensor:
        """The mean of x² along a dimension of one leaf, which stays with length 1: for functions of `each`."""
        return leaf.square().mean(dim, keepdim=True)

    def sign(self, x: Leaf) -> Leaf:
        """−1, 0 or 1."""
        return x.sign()

    def abs(self, x: Leaf) -> Leaf:
        """|x|."""
        return x.abs()

    def abs_(self, x: Leaf) -> Leaf:
        """|x|."""
        return x.abs()

    def each(self, function: Callable[..., Tensor], *xs: Leaf) -> Leaf:
        """`function` of one leaf's tensors: for rules that look at a leaf's shape or norm. It must be pure."""
        return function(*xs)


class InPlace:
    """Arithmetic on the lists of all leaves by torch's foreach operations, in their memory."""

    def __init__(self, params: list[Tensor]) -> None:
        self.param = params

    def decay(self, rate: Number) -> None:
        """p ← p − rate · p."""
        torch._foreach_mul_(self.param, 1 - rate)

    def descend(self, direction: Leaf, rate: Number) -> None:
        """p ← p − rate · direction."""
        torch._foreach_add_(self.param, direction, alpha=-rate)

    def descend_ratio(self, numerator: Leaf, denominator: Leaf, rate: Number) -> None:
        """p ← p − rate · numerator / denominator."""
        torch._foreach_addcdiv_(self.param, numerator, denominator, -rate)

    def move_to(self, place: Leaf) -> None:
        """p ← place."""
        torch._foreach_copy_(self.param, place)

    def mul_(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x · y, in x."""
        torch._foreach_mul_(x, y)
        return x

    def mul(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x · y."""
        return torch._foreach_mul(x, y)

    def div_(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x / y, in x."""
        torch._foreach_div_(x, y)
        return x

    def div(self, x: Leaf, y: Leaf | Number) -> Leaf:
        """x / y."""
        return torch._foreach_div(x, y)

    def shift_(self, x: Leaf, by: Number) -> Leaf:
        """x + by, in x, for a number."""
        torch._foreach_add_(x, by)
        return x

    def shift(self, x: Leaf, by: Number) -> Leaf:
        """x + by, for a number."""
        return torch._foreach_add(x, by)

    def add_(self, x: Leaf, y: Leaf, times: Number = 1) -> Leaf:
        """x + times · y, in x."""
        torch._foreach_add_(x, y, alpha=times)
        return x

    def add(self, x: Leaf, y: Leaf, times: Number = 1) -> Leaf:
        """x + times · y."""
        return torch._foreach_add(x, y, alpha=times)

    def lerp_(self, x: Leaf, y: Leaf, share: Number) -> Leaf:
        """x + share · (y − x), in x."""
        torch._foreach_lerp_(x, y, share)
        return x

    def lerp(self, x: Leaf, y: Leaf, share: Number) -> Leaf:
        """x + share · (y − x)."""
        return torch._foreach_lerp(x, y, share)

    def addcmul_(self, x: Leaf, y: Leaf, z: Leaf, times: Number = 1) -> Leaf:
        """x + times · y · z, in x."""
        torch._foreach_addcmul_(x, y, z, times)
        return x

    def addcdiv_(self, x: Leaf, y: Leaf, z: Leaf, times: Number = 1) -> Leaf:
        """x + times · y / z, in x."""
        torch._foreach_addcdiv_(x, y, z, times)
        return x

    def maximum_(self, x: Leaf, y: Leaf) -> Leaf:
        """The larger of both, element by element, in x."""
        torch._foreach_maximum_(x, y)
        return x

    def clamp_min_(self, x: Leaf, low: Leaf | Number) -> Leaf:
        """The larger of x and `low`, a number a leaf, in x; NaN stays."""
        torch._foreach_clamp_min_(x, low)
        return x

    def sqrt(self, x: Leaf) -> Leaf:
        """√x."""
        return torch._foreach_sqrt(x)

    def sqrt_(self, x: Leaf) -> Leaf:
        """√x, in x."""
        torch._foreach_sqrt_(x)
        return x

    def sqrt_into(self, memory: Leaf, x: Leaf) -> Leaf:
        """√x, in the memory of another leaf that is no longer needed."""
        for leaf, place in zip(x, memory):
            torch.sqrt(leaf, out=place)
        return memory

    def rsqrt_(self, x: Leaf) -> Leaf:
        """1 / √x, in x, for x above 0."""
        torch._foreach_rsqrt_(x)
        return x

    def norm(self, x: Leaf) -> Leaf:
        """√Σx², a number a leaf."""
        return [torch.linalg.vector_norm(leaf) for leaf in x]

    def mean_square(self, leaf: Tensor, dim: int) -> Tensor:
        """The mean of x² along a dimension of one leaf, which stays with length 1: for functions of `each`."""
        # A norm needs no memory for the squares.
        return torch.linalg.vector_norm(leaf, dim=dim, keepdim=True).square_().div_(leaf.shape[dim])

    def sign(self, x: Leaf) -> Leaf:
        """−1, 0 or 1."""
        return torch._foreach_sign(x)

    def abs(self, x: Leaf) -> Leaf:
        """|x|."""
        return torch._foreach_abs(x)

    def abs_(self, x: Leaf) -> Leaf:
        """|x|, in x."""
        torch._foreach_abs_(x)
        return x

    def each(self, function: Callable[..., Tensor], *xs: Leaf) -> Leaf:
        """`function` of each leaf's tensors."""
        return [function(*row) for row in zip(*xs)]


Arithmetic = Pure | InPlace


def _is_one(number: Number) -> bool:
    return isinstance(number, int) and number == 1


# --- numbers that all leaves share: of floats, or of 0-d tensors -----------------------------------------------------


def root(number: Number) -> Number:
    """√number."""
    return number**0.5


def choose(condition: Any, yes: Number, no: Number) -> Number:
    """`yes` where the condition holds, else `no`; both are computed, and the one not chosen may be anything but an error."""
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else yes if condition else no


def larger(number: Number, other: Number) -> Number:
    """The larger of two numbers."""
    return choose(number > other, number, other)
