"""Examples' gradients from one backward pass over the batch, whose layers are taken apart example by example."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import loss as losses
from functrain.core import tree
from functrain.core.examples.batch import Examples, added, joined
from functrain.core.examples.contribution import Contribution
from functrain.core.examples.norms import Account, accounts, norms
from functrain.core.examples.reference import Scale
from functrain.core.examples.rules import RULES
from functrain.core.examples.tape import Tape
from functrain.core.reduce.base import Gradient
from functrain.core.tree import Tree


class Recording(NamedTuple):
    """A run of the loss on all examples: each one's totals, with the graph that leads to them, and the notes taken."""

    leaves: list[Tensor]
    tape: Tape
    totals: losses.Totals

    def accounts(self) -> list[Account]:
        """Each leaf's contributions, after one backward pass."""
        return accounts(self.leaves, self.tape.contributions(self.totals.loss))

    def gradient(self) -> Gradient:
        """All but the gradients: loss, weight and aux `(N, …)`, and the lanes of carry."""
        loss, weight, aux, carry = tree.map(Tensor.detach, self.totals)
        return Gradient(None, loss, weight, None if carry is None else tree.map(lambda leaf: leaf.flatten(0, 1), carry), aux)


def record(examples: Examples) -> Recording:
    """Run the loss on every example as a batch of one, all together, under torch.func.vmap."""
    grad, params, batch, carry, keys, size = examples
    leaves, params_spec = tree.flatten(params)
    tape = Tape(leaves, size, RULES)
    flat, spec = tree.flatten((batch, carry, keys))
    result = None

    def noted(params: Tree, batch: Tree, **keywords: Tree) -> Any:
        with tape:
            return grad.loss(params, batch, **keywords)

    def one(*leaves: Tensor) -> list[Tensor]:
        nonlocal result
        part, lane, own = tree.unflatten(spec, leaves)
        totals = losses.total(noted, grad.uses, tree.unflatten(params_spec, tape.raw), part, 1, lane, own)
        outputs, result = tree.flatten(totals)
        return outputs

    with torch.enable_grad():
        outputs = tape.run(one, [leaf.unsqueeze(1) for leaf in flat])
    assert result is not None
    return Recording(leaves, tape, tree.unflatten(result, outputs))


def rows(examples: Examples, budget: int) -> Gradient:
    """Each example's gradient, loss, weight and aux: leaves `(N, …)`."""
    recording = record(examples)
    if (count := _fitting(recording, budget)) < examples.size:
        del recording
        return joined([rows(part, budget) for part in examples.parts(count)])
    with torch.no_grad():
        grads = [account.rows(examples.size) for account in recording.accounts()]
    return recording.gradient()._replace(grads=tree.unflatten(tree.structure(examples.params), grads))


def scaled(examples: Examples, scale: Scale, budget: int) -> Gradient:
    """Σᵢ s(‖gᵢ‖) gᵢ, Σ loss, Σ weight, Σ aux."""
    recording = record(examples)
    if (count := _fitting(recording, budget)) < examples.size:
        del recording
        return added([scaled(part, scale, budget) for part in examples.parts(count)])
    with torch.no_grad():
        lengths, found = norms(recording.accounts(), examples.size, budget)
        scales = scale(lengths)
        grads = [account.scaled(scales) for account in found]
        _, loss, weight, carry, aux = recording.gradient()
        loss, weight, aux = tree.map(lambda leaf: leaf.sum(0), (loss, weight, aux))
    return Gradient(tree.unflatten(tree.structure(examples.params), grads), loss, weight, carry, aux)


def _fitting(recording: Recording, budget: int) -> int:
    """How many examples' expanded leaves fit the budget at once: at least one."""
    return max(1, budget // max(1, recording.tape.bytes_each()))


def algebra(examples: Examples) -> list[str]:
    """How the gradient of each leaf is found, in words."""
    return [_described(account.uses) for account in record(examples).accounts()]


def _described(uses: list[Contribution]) -> str:
    if not uses:
        return "unused: zero"
    if len(uses) == 1:
        return uses[0].algebra
    kinds = dict.fromkeys(use.algebra.split(":")[0] for use in uses)
    return f"{' and '.join(kinds)}: used {len(uses)} times, a gradient for each example"
