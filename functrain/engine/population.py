"""Many runs as one: a step vmapped over members with their own params, hyperparameters and randomness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.deferred import drawn
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.step import Metrics, Step, check_owned
from functrain.core.tree import Tree


def population(step: Step) -> Step:
    """One step for K members at once: states are stacked to leaves `(K, …)`, the batch is shared.

    `init` takes the members' states, a sequence of what `step.init` (and `ft.with_hyper`) gave; member k is then the
    run of its own state alone, up to rounding. Metrics are `(K,)`. `ft.tree.unstack(state)` gives the members back.
    Members have to agree in structure and shapes; they may differ in every number that is in the state.

    Raises `TreeError` for members that differ in structure or position.

    >>> import functrain as ft
    >>> train = ft.step(ft.grad(lambda p, b: (b - p["mean"]) ** 2), ft.optim.sgd(0.1))
    >>> alone = train.init({"mean": torch.tensor(0.0)})
    >>> both = ft.population(train)
    >>> state, metrics = both(both.init([alone, ft.with_hyper(alone, lr=0.5)]), torch.ones(3))
    >>> state.params["mean"]
    tensor([0.2000, 1.0000])
    """
    if not isinstance(step, Step):
        raise ArgumentError(f"population takes a step, got {explain(step).title}")
    if step.donates:
        raise ArgumentError("a population cannot be made of a donating step: donate outside, ft.compiled(ft.population(step))")

    def init(members: Sequence[Any]) -> Any:
        states = list(members)
        if not states:
            raise ArgumentError("a population needs at least one member's state")
        for state in states:
            if not hasattr(state, "position"):
                got = type(state).__name__
                raise ArgumentError(f"a population's init takes a list of states, [step.init(…), …], got {got}")
            check_owned(state)
        if any(state.position.ndim for state in states):
            raise TreeError("a member of a population is a single state, got that of a population: see ft.tree.unstack")
        if len({int(state.position) for state in states}) > 1:
            raise TreeError("members of a population have to be at the same position")
        kinds = [[(leaf.shape, leaf.dtype) for leaf in tree.leaves(state)] for state in states]
        if not tree.same_structure(*states) or any(kind != kinds[0] for kind in kinds):
            raise TreeError("members of a population have to agree in structure, shapes and dtypes of their states")
        return tree.stack(states)

    def update(states: Any, batch: Tree) -> tuple[Any, Metrics]:
        check_owned(states)
        # Outside of the transform: a source need not know of torch.func.
        batch = drawn(batch)
        if states.position.ndim != 1:
            raise TreeError("this is a single state: a population's is made by its init([state, …]) from its members'")
        flat, spec = tree.flatten(states)
        result = None

        def one(*leaves: Tensor) -> tuple[Tensor, ...]:
            nonlocal result
            outputs, result = tree.flatten(step.update(tree.unflatten(spec, leaves), batch))
            return tuple(outputs)

        outputs = torch.func.vmap(one)(*flat)
        assert result is not None
        new: tuple[Any, Metrics] = tree.unflatten(result, outputs)
        return new

    def stage() -> Stage:
        return Stage("population", {"plan": "vmap over members, the batch shared"}, [explain(step)])

    return Step(init, update, stage, takes=step.takes)
