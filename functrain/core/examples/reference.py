"""Examples' gradients by definition: the gradient of each by itself, mapped over them or one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.examples.batch import Examples, added, joined
from functrain.core.examples.contribution import combined, exact, lengths, overall
from functrain.core.grad import entry_of, summed
from functrain.core.reduce.base import Gradient

Scale = Callable[[Tensor], Tensor]
Rows = Callable[[Examples], Gradient]


def by_vmap(examples: Examples) -> Gradient:
    """The rows `(N, …)` by torch.func.vmap over the gradient: any operation that has a batching rule, nested anywhere."""
    grad, params, batch, carry, keys, _ = examples
    flat, spec = tree.flatten((batch, carry, keys))
    result = None

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal result
        part, lane, own = tree.unflatten(spec, leaves)
        outputs, result = tree.flatten(summed(grad, params, part, carry=lane, key=own))
        return tuple(outputs)

    outputs = torch.func.vmap(one, randomness="different")(*(leaf.unsqueeze(1) for leaf in flat))
    assert result is not None
    taken: Gradient = tree.unflatten(result, outputs)
    return taken._replace(carry=tree.map(lambda leaf: leaf.flatten(0, 1), taken.carry))


def by_loop(examples: Examples) -> Gradient:
    """The rows `(N, …)` one after the other: anything that has a gradient."""
    taken = [summed(one.grad, one.params, one.batch, carry=one.carry, key=one.keys) for one in examples.parts(1)]
    lanes = tree.map(lambda *leaves: torch.cat(leaves), *(one.carry for one in taken))
    stacked: Gradient = tree.stack([one._replace(carry=None) for one in taken])
    return stacked._replace(carry=lanes)


def rows(examples: Examples, budget: int, one: Rows) -> Gradient:
    """The rows of all examples, so many at a time as fit the budget."""
    return joined([one(part) for part in examples.parts(_fitting(examples, budget))])


def scaled(examples: Examples, scale: Scale, budget: int, one: Rows) -> Gradient:
    """Σᵢ s(‖gᵢ‖) gᵢ, Σ loss, Σ weight, Σ aux."""
    return added([_scaled(one(part), scale) for part in examples.parts(_fitting(examples, budget))])


def _scaled(taken: Gradient, scale: Scale) -> Gradient:
    # In float64, where the squares of finite numbers are finite.
    leaves = tree.leaves(taken.grads)
    dtype = torch.float64 if any(exact(leaf.dtype) == torch.float64 for leaf in leaves) else torch.float32
    scales = scale(overall([lengths(leaf, torch.float64) for leaf in leaves]).to(dtype))
    loss, weight, aux = tree.map(lambda leaf: leaf.sum(0), (taken.loss, taken.weight, taken.aux))
    return Gradient(tree.map(lambda leaf: combined(scales, leaf), taken.grads), loss, weight, taken.carry, aux)


def _fitting(examples: Examples, budget: int) -> int:
    size = sum(leaf.numel() * leaf.element_size() for leaf in entry_of(examples.grad, examples.params).leaves)
    return max(1, budget // max(1, size))
