"""Comparing trees: what "equal", "the same bits" and "unchanged" mean in a law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import FunctrainError
from functrain.core.tree import Tree


class LawError(FunctrainError, AssertionError):
    """A part breaks a law that functrain builds on; the message has the law and the counter-example."""


def same_bits(law: str, got: Tree, expected: Tree) -> None:
    """Raise `LawError` unless both trees have one structure, and leaves of the same dtype, shape and bits.

    >>> same_bits("Copying changes nothing", {"w": torch.ones(2).clone()}, {"w": torch.ones(2)})
    """
    compare(law, got, expected, lambda a, b: a.dtype == b.dtype and _bits_equal(a, b))


def equal(law: str, got: Tree, expected: Tree, tolerance: float | None = None) -> None:
    """Raise `LawError` unless both trees agree up to rounding.

    |got − expected| ≤ tolerance · max(1, max |expected|), leaf by leaf; the tolerance is 10⁻⁴ for float32, 10⁻⁹ for
    float64 and 0.05 below.

    >>> equal("Halves add up", torch.tensor(1.0) / 3 * 3, torch.tensor(1.0))
    """

    def close(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point():
            return torch.equal(a, b)
        bound = tolerance if tolerance is not None else {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 0.05)
        scale = max(1.0, b.detach().double().nan_to_num().abs().max().item()) if b.numel() else 1.0
        return torch.allclose(a.double(), b.double(), rtol=0.0, atol=bound * scale, equal_nan=True)

    compare(law, got, expected, close)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def compare(law: str, got: Tree, expected: Tree, agree: Callable[[Tensor, Tensor], bool]) -> None:
    """Raise `LawError`, with the path of a counter-example, unless the trees are alike and all pairs of leaves `agree`."""
    if not tree.same_structure(got, expected):
        raise LawError(f"{law}: the results differ in structure, {tree.difference(expected, got)}")
    for path, a, b in zip(tree.paths(expected), tree.leaves(got), tree.leaves(expected)):
        if a.shape != b.shape or not agree(a.detach(), b.detach()):
            where = f" at {path!r}" if path else ""
            raise LawError(f"{law}: counter-example{where}, got {_shown(a)}, expected {_shown(b)}")


def _shown(leaf: Tensor) -> str:
    values = leaf.detach().reshape(-1)[:4].tolist()
    return f"{leaf.dtype} {tuple(leaf.shape)} {values}{' …' if leaf.numel() > 4 else ''}"


def copied(value: Tree) -> Tree:
    """The tree with tensors of its own."""
    return tree.map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def unchanged(law: str, call: Callable[..., Any], *arguments: Tree) -> Any:
    """What `call(*arguments)` gives; `LawError` when it changed an argument."""
    before = copied(arguments)
    result = call(*arguments)
    same_bits(law, arguments, before)
    return result


def alike(law: str, got: Tree, expected: Tree) -> None:
    """Raise `LawError` unless both trees have one structure, and leaves of the same shape and dtype."""
    compare(law, got, expected, lambda a, b: a.dtype == b.dtype)
