"""A step as one compiled graph, its state updated in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, FunctrainError
from functrain.core.explain import Stage, explain
from functrain.core.step import Metrics, Step, check_owned, moved, taken_over
from functrain.core.tree import Tree

Graph = Callable[..., Any]


def compiled(step: Step, *, donate: bool = True) -> Step:
    """The same step as one graph: gradient, reduction, update and schedule in a single call of compiled code.

    The step is traced once for each structure, shape and dtype of state and batch (so a ragged last batch is traced
    once more) and handed to torch's inductor. Counters and hyperparameters are tensors in the state: they never
    trace again. What the loss closes over is a constant of the graph.

    With `donate` the state's buffers are updated in place, and the state given is empty afterwards: using it again
    in a step is a `DonatedError`. With `donate=False` states are values, as without compiling.

    Without a C++ compiler the step runs as it is, after one warning. Raises `FunctrainError` for a step that is not
    one graph (its control flow depends on the values of tensors).

    >>> import functrain as ft
    >>> train = ft.compiled(ft.step(ft.grad(lambda p, b: (b - p["mean"]) ** 2), ft.optim.sgd(0.25)))
    >>> print(ft.explain(train).title)
    compiled
    """
    if not isinstance(step, Step):
        raise ArgumentError(f"compiled takes a step, got {explain(step).title}: write ft.compiled(ft.step(grad, optimizer))")
    graphs: dict[Any, _Graph] = {}
    eager = False

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        nonlocal eager
        check_owned(state)
        if eager:
            return _eager(step, state, batch, donate)
        given, given_spec = tree.flatten((state, batch))
        signature = (given_spec, *[(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in given])
        graph = graphs.get(signature)
        if graph is None:
            try:
                graph = graphs[signature] = _Graph(step, state, batch, donate)
            except _NoCompiler as error:
                eager = True
                warnings.warn(f"no C++ compiler ({error}): the step runs uncompiled", RuntimeWarning, stacklevel=2)
                return _eager(step, state, batch, donate)
        return graph(given)

    def stage() -> Stage:
        facts = {
            "runs as": "one graph (torch inductor)" if not eager else "eager: there is no C++ compiler",
            "state": "donated: updated in place" if donate else "pure: a new state each step",
            "traced for": f"{len(graphs)} shapes so far",
        }
        return Stage("compiled", facts, [explain(step)])

    return Step(step.init, update, stage, donate)


class _NoCompiler(Exception):
    pass


def _eager(step: Step, state: Any, batch: Tree, donate: bool) -> tuple[Any, Metrics]:
    new, metrics = step.update(state, batch)
    return (taken_over(state, new) if donate and not step.donates else new), metrics


class _Graph:
    """One traced and compiled update, for one signature."""

    def __init__(self, step: Step, state: Any, batch: Tree, donate: bool) -> None:
        flat_state, state_spec = tree.flatten(state)
        flat_batch, batch_spec = tree.flatten(batch)
        size = len(flat_state)
        self.donate = donate
        self.results: Any = None
        self.changed: list[int] = []

        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            old = leaves[:size]
            new, metrics = step.update(tree.unflatten(state_spec, old), tree.unflatten(batch_spec, leaves[size:]))
            fresh, spec = tree.flatten(new)
            if spec != state_spec:
                raise FunctrainError(f"the step changes the structure of its state: {tree.difference(state, new)}")
            # A leaf that the step hands through (a key, a hyperparameter) is no output of the graph.
            self.changed = [place for place, (leaf, before) in enumerate(zip(fresh, old)) if leaf is not before]
            measured, self.results = tree.flatten(metrics)
            outputs = _apart([fresh[place] for place in self.changed] + measured, leaves)
            if not donate:
                return tuple(outputs)
            for place, leaf in zip(self.changed, outputs):
                old[place].copy_(leaf)
            return tuple(outputs[len(self.changed) :])

        self.spec, self.size = state_spec, size
        self.run = _compile(flat, [*flat_state, *flat_batch])

    def __call__(self, given: list[Tensor]) -> tuple[Any, Metrics]:
        with torch.no_grad():
            outputs = list(self.run(*given))
        leaves = given[: self.size]
        if self.donate:
            for place in self.changed:
                leaves[place] = moved(leaves[place])
        else:
            for place, leaf in zip(self.changed, outputs):
                leaves[place] = leaf
            outputs = outputs[len(self.changed) :]
        return tree.unflatten(self.spec, leaves), tree.unflatten(self.results, outputs)


def _apart(outputs: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs, cloned where they share memory with an input: donated buffers are about to be written to."""
    taken = {leaf.untyped_storage()._cdata for leaf in inputs}
    return [leaf.clone() if leaf.untyped_storage()._cdata in taken else leaf for leaf in outputs]


def _compile(function: Callable[..., Any], examples: list[Tensor]) -> Graph:
    # Traced at the level of operators and given to inductor directly: no guards are checked at each call
    # (233 µs against 301 µs by torch.compile for an MLP of 64-128-128-10), and no Python feature is out of bounds.
    from torch._inductor.exc import InductorError, InvalidCxxCompiler
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        try:
            # The trace runs the step once, on copies: a donating step writes into what it is given.
            graph = make_fx(function)(*[leaf.clone() for leaf in examples])
        except RuntimeError as error:
            if "tracing tensor" not in str(error):
                raise
            raise FunctrainError(
                "the step is not one graph, it reads the value of a tensor (an if, float() or .item() in the loss): use "
                "torch.where, or run the step uncompiled"
            ) from error
        try:
            # The signature already fixes sizes and strides: checking them again costs 20 µs a call.
            unchecked = {"size_asserts": False, "alignment_asserts": False}
            return torch._inductor.compile(graph, list(examples), options=unchecked)  # type: ignore[no-any-return]
        except (InvalidCxxCompiler, InductorError) as error:
            if isinstance(error, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(error):
                raise _NoCompiler(str(error).strip().split("\n")[0]) from error
            raise
