"""The laws of steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safetensors.torch import load, save

from functrain.core import tree
from functrain.core.errors import DonatedError
from functrain.core.explain import explain
from functrain.core.step import Step
from functrain.core.tree import Tree
from functrain.testing.comparing import LawError, copied, same_bits, unchanged


def check_step(step: Step, start: Tree, batches: Iterable[Tree]) -> None:
    """Check that a step is a function of its state and batch alone, and that the state is all there is to a run.

    - the same bits when run again; the batch is unchanged, and so is the state, unless the step donates: then
      the old state cannot be used again;
    - resume: a run that stops after any step, has its state written to bytes and read again, goes on with the same bits.

    `start`: a state of the step, or params for `step.init`.

    >>> import functrain as ft, torch
    >>> loss = lambda params, batch: (batch - params["mean"]) ** 2
    >>> check_step(ft.step(ft.grad(loss), ft.optim.adam(0.1)), {"mean": torch.tensor(0.0)}, [torch.ones(3)] * 3)
    """
    name = explain(step).title
    rows = list(batches)
    first = copied(start) if hasattr(start, "position") else step.init(start)
    states, metrics = [copied(first)], []
    for batch in rows:
        given = copied(states[-1])
        new, measured = unchanged(f"{name}: the batch is unchanged", lambda b, given=given: step(given, b), batch)
        if step.donates:
            _check_donated(name, step, given, batch)
        else:
            same_bits(f"{name}: the state given is unchanged", given, states[-1])
        states.append(copied(new))
        metrics.append(copied(measured))
    for stop in range(len(rows)):
        state = _reread(states[stop])
        for place in range(stop, len(rows)):
            state, measured = step(state, rows[place])
            law = f"{name}: resumed after step {stop}, step {place + 1} has the same bits"
            same_bits(law, (state, measured), (states[place + 1], metrics[place]))


def _check_donated(name: str, step: Step, given: Any, batch: Tree) -> None:
    try:
        step(given, batch)
    except DonatedError:
        return
    raise LawError(f"{name}: it donates, so using a state again is a DonatedError; nothing was raised")


def _reread(state: Any) -> Any:
    flat, spec = tree.flatten(state)
    loaded = load(save({str(place): leaf.contiguous() for place, leaf in enumerate(flat)}))
    return tree.unflatten(spec, [loaded[str(place)] for place in range(len(flat))])
