"""The law of guards."""

from __future__ import annotations

from typing import Any

from functrain.core.explain import explain
from functrain.core.guard import guard
from functrain.core.step import Step
from functrain.core.tree import Tree
from functrain.testing.comparing import LawError, copied, same_bits


def check_guard(step: Step, state: Any, good_batch: Tree, bad_batch: Tree) -> None:
    """Check what `ft.guard(step)` makes of a batch that is finite, and of one that is not.

    - transparent: the state and metrics after the good batch have the bits that they have without a guard;
    - after the bad batch params, optimizer state and carry are the old ones, the position is the next, and metrics say so.

    >>> import functrain as ft, torch
    >>> step = ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.adam(0.1))
    >>> check_guard(step, step.init(torch.tensor(0.0)), torch.ones(2), torch.tensor([1.0, torch.inf]))
    """
    name, guarded = f"guard({explain(step).title})", guard(step)
    before = copied(state)
    for law, batch in (("on a finite batch the same step", good_batch), ("metrics are those of the step", bad_batch)):
        expected, measured = step(state, batch)
        new, metrics = guarded(state, batch)
        same_bits(f"{name}: {law}", {key: value for key, value in metrics.items() if key != "skipped"}, measured)
        same_bits(f"{name}: the state given is unchanged", state, before)
        bad = batch is bad_batch
        if metrics["skipped"].item() != bad:
            raise LawError(f"{name}: skipped is {metrics['skipped'].item()} for the {'bad' if bad else 'good'} batch")
        kept = state._replace(key=expected.key, position=expected.position)
        same_bits(f"{name}: {'the old state at the next position' if bad else law}", new, kept if bad else expected)
