"""Examples' gradients from one backward pass over the batch, whose layers are taken apart example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from functrain.core import loss as losses
from functrain.core import tree
from functrain.core.entries import Entry
from functrain.core.examples.batch import Examples, added, joined
from functrain.core.examples.contribution import Contribution
from functrain.core.examples.norms import Account, accounts, norms
from functrain.core.examples.reference import Scale
from functrain.core.examples.rules import RULES
from functrain.core.examples.tape import LayoutError, OverBudgetError, Tape
from functrain.core.grad import entry_of
from functrain.core.reduce.base import Gradient
from functrain.core.tree import Tree

Result = TypeVar("Result")


class Recording(NamedTuple):
    """A run of the loss on all examples: each one's totals, with the graph that leads to them, and the notes taken."""

    params: Entry
    tape: Tape
    totals: losses.Totals

    def accounts(self) -> list[Account]:
        """Each leaf's contributions, after one backward pass."""
        return accounts(self.params.leaves, self.tape.contributions(self.totals.loss))

    def gradient(self) -> Gradient:
        """All but the gradients: loss, weight and aux `(N, …)`, and the lanes of carry."""
        loss, weight, aux, carry = tree.map(Tensor.detach, self.totals)
        return Gradient(None, loss, weight, None if carry is None else tree.map(lambda leaf: leaf.flatten(0, 1), carry), aux)


def record(examples: Examples, budget: int, relay: bool = True) -> Recording:
    """Run the loss on every example as a batch of one, all together, as under torch.func.vmap (`relay`: see `Tape`)."""
    grad, params, batch, carry, keys, size = examples
    mine = entry_of(grad, params)
    tape = Tape(mine.leaves, size, RULES, budget, relay)
    flat, spec = tree.flatten((batch, carry, keys))
    result = None

    def noted(params: Tree, batch: Tree, **keywords: Tree) -> Any:
        with tape:
            return grad.loss(params, batch, **keywords)

    def one(*leaves: Tensor) -> list[Tensor]:
        nonlocal result
        part, lane, own = tree.unflatten(spec, leaves)
        totals = losses.total(noted, grad.uses, mine.whole(tape.raw), part, 1, lane, own)
        outputs, result = tree.flatten(totals)
        return outputs

    with torch.enable_grad():
        outputs = tape.run(one, [leaf.unsqueeze(1) for leaf in flat])
    assert result is not None
    return Recording(mine, tape, tree.unflatten(result, outputs))


def rows(examples: Examples, budget: int) -> Gradient:
    """Each example's gradient, loss, weight and aux: leaves `(N, …)`."""

    def taken(recording: Recording) -> Gradient:
        grads = [account.rows(examples.size) for account in recording.accounts()]
        return recording.gradient()._replace(grads=tree.unflatten(recording.params.spec, grads))

    return _whole_or_cut(examples, budget, taken, lambda part: rows(part, budget), joined)


def scaled(examples: Examples, scale: Scale, budget: int) -> Gradient:
    """Σᵢ s(‖gᵢ‖) gᵢ, Σ loss, Σ weight, Σ aux."""

    def taken(recording: Recording) -> Gradient:
        lengths, found = norms(recording.accounts(), examples.size, budget)
        scales = scale(lengths)
        grads = [account.scaled(scales) for account in found]
        _, loss, weight, carry, aux = recording.gradient()
        loss, weight, aux = tree.map(lambda leaf: leaf.sum(0), (loss, weight, aux))
        return Gradient(tree.unflatten(recording.params.spec, grads), loss, weight, carry, aux)

    return _whole_or_cut(examples, budget, taken, lambda part: scaled(part, scale, budget), added)


def _whole_or_cut(
    examples: Examples,
    budget: int,
    taken: Callable[[Recording], Gradient],
    again: Callable[[Examples], Gradient],
    join: Callable[[list[Gradient]], Gradient],
) -> Gradient:
    try:
        return _laid(examples, budget, taken)
    except OverBudgetError as over:
        count = over.count
    return join([again(part) for part in examples.parts(count)])


def _laid(examples: Examples, budget: int, taken: Callable[[Recording], Result]) -> Result:
    """What is taken of a recording, with its tensors in the fastest layout, or in that which the loss counts on."""

    def run(relay: bool) -> Result:
        recording = record(examples, budget, relay)
        with _exactly(recording.params.leaves):
            return taken(recording)

    try:
        return run(relay=True)
    except LayoutError:
        pass
    return run(relay=False)


@contextmanager
def _exactly(leaves: list[Tensor]) -> Iterator[None]:
    """Without gradients, and without the shorter dtypes that autocast around the caller would choose for norms and sums."""
    kind = leaves[0].device.type
    shortened = torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if shortened else nullcontext():
        yield


def algebra(examples: Examples) -> list[str]:
    """How the gradient of each leaf is found, in words, by the run of a single example."""
    return _laid(examples, 0, lambda recording: [_described(account.uses) for account in recording.accounts()])


def _described(uses: list[Contribution]) -> str:
    if not uses:
        return "unused: zero"
    if len(uses) == 1:
        return uses[0].algebra
    kinds = dict.fromkeys(use.algebra.split(":")[0] for use in uses)
    return f"{' and '.join(kinds)}: used {len(uses)} times, a gradient for each example"
