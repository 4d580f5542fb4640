"""A step as one compiled graph, its state updated in place."""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.deferred import Deferred
from functrain.core.errors import ArgumentError, FunctrainError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.layout import Layout, order
from functrain.core.step import Metrics, Step, apart, check_owned, moved, taken_over
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree
from functrain.engine.channels import channels_last
from functrain.engine.graph import NoCompilerError, hands_on, lowered, traced


def compiled(step: Step, *, donate: bool = True) -> Step:
    """The same step as one graph: gradient, reduction, update and schedule in a single call of compiled code.

    The step is traced once for each structure, shape and dtype of state and batch (so a ragged last batch is traced
    once more) and handed to torch's inductor. Counters and hyperparameters are tensors in the state: they never
    trace again. What the loss closes over is a constant of the graph.

    With `donate` the state's buffers are updated in place, and the state given is empty afterwards: using it again
    in a step is a `DonatedError`. With `donate=False` states are values, as without compiling.

    Compiled code is kept on disk by inductor: another process compiles the same step in about half the time. Autocast and
    the default dtype are those of each call.

    Without a C++ compiler the step runs as it is, after one warning. Raises `FunctrainError` for a step that is not
    one graph (its control flow depends on the values of tensors), `ArgumentError` for a state or batch that requires grad.

    >>> import functrain as ft
    >>> train = ft.compiled(ft.step(ft.grad(lambda p, b: (b - p["mean"]) ** 2), ft.optim.sgd(0.25)))
    >>> print(ft.explain(train).title)
    compiled
    """
    if not isinstance(step, Step):
        raise ArgumentError(f"compiled takes a step, got {explain(step).title}: write ft.compiled(ft.step(grad, optimizer))")
    graphs: dict[Any, _Graph] = {}
    latest: list[_Graph] = []
    eager = False

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        nonlocal eager
        if inside_tracing() or inside_transform():
            # A compiler or transform around this one takes the step as it is.
            return step.update(state, batch)
        # Held by a name of its own: another thread may put another graph in its place.
        last = latest[-1] if latest else None
        if last is not None and (known := last.known(state, batch)) is not None:
            return last(known, again=True)
        check_owned(state)
        if eager:
            return _eager(step, state, batch, donate)
        given, given_spec = tree.flatten((state, batch))
        given = [leaf if isinstance(leaf, Tensor) and not _lazy(leaf) else _resolved(leaf) for leaf in given]
        if any(map(_tracked, given)):
            raise ArgumentError(
                "no derivative flows through a compiled step, and the state or batch it is given requires grad: differentiate "
                "the step uncompiled (ft.unroll), or give it .detach()ed tensors"
            )
        size = tree.structure(state).num_leaves
        given = _distinct(given, size, donate)
        signature = (given_spec, order((state, batch)), _modes(), *map(_kind, given))
        graph = graphs.get(signature)
        if graph is None:
            try:
                # Tracing and inductor patch what is global: two threads at once would corrupt each other's graphs.
                with _COMPILING:
                    graph = graphs.get(signature)
                    if graph is None:
                        whole, part = tree.unflatten(given_spec, given)
                        graph = graphs[signature] = _Graph(step, whole, part, donate)
            except NoCompilerError as error:
                eager = True
                warnings.warn(f"no C++ compiler ({error}): the step runs uncompiled", RuntimeWarning, stacklevel=2)
                return _eager(step, state, batch, donate)
        latest[:] = [graph]
        return graph(given)

    def stage() -> Stage:
        facts = {
            "runs as": "one graph (torch inductor)" if not eager else "eager: there is no C++ compiler",
            "state": "donated: updated in place" if donate else "pure: a new state each step",
            "traced for": f"{len(graphs)} shapes so far",
        }
        return Stage("compiled", facts, [_in_graph(explain(step))])

    def remake(grad: Any) -> Step:
        return compiled(step.remade(grad), donate=donate)

    return Step(step.init, update, stage, donate, step.grad, remake, step.takes)


def _in_graph(stage: Stage) -> Stage:
    """What a step says of itself, without what holds only outside a graph."""
    facts = {name: text for name, text in stage.facts.items() if name not in ("state", "update", "workers")}
    if facts.get("plan", "").startswith("threads"):
        facts["plan"] = "loop (threads are looped inside a graph)"
    return Stage(stage.title, facts, [_in_graph(inner) for inner in stage.inner])


_COMPILING = threading.Lock()


def _kind(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


def _modes() -> tuple[Any, ...]:
    # What a trace would keep for ever: it is the mode of the call, not of the step.
    if not torch._C._is_any_autocast_enabled():
        return (torch.get_default_dtype(),)
    kinds = ("cpu", "cuda")
    return (torch.get_default_dtype(), *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))


def _distinct(given: list[Tensor], size: int, donate: bool) -> list[Tensor]:
    """The leaves as tensors of their own: a graph would take one that it is given twice for the same for ever.

    What of the batch lies in the memory of a donated state is copied: the state is written to.
    """
    seen: set[int] = set()
    donated = {_memory(leaf) for leaf in given[:size]} if donate else set()
    rows = []
    for place, leaf in enumerate(given):
        one = leaf.detach() if id(leaf) in seen else leaf
        if donate and (_memory(leaf) in donated if place >= size else _overlaps(leaf)):
            one = leaf.clone(memory_format=torch.contiguous_format)
        seen.add(id(leaf))
        rows.append(one)
    return rows


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage()._cdata if leaf.layout == torch.strided else id(leaf)


def _overlaps(leaf: Tensor) -> bool:
    return leaf.layout == torch.strided and any(step == 0 and size > 1 for step, size in zip(leaf.stride(), leaf.shape))


def _lazy(leaf: Tensor) -> bool:
    return leaf.is_conj() or leaf.is_neg()


def _tracked(leaf: Tensor) -> bool:
    return leaf.requires_grad and torch.is_grad_enabled()


def _resolved(leaf: Any) -> Tensor:
    # A lazily negated or conjugated view has the shape and strides of a plain tensor, and other values.
    if isinstance(leaf, Deferred):
        raise ArgumentError(
            "a compiled step is one graph, on one thread: it takes batches that are read already, not deferred ones. Give it "
            "source.drawn(), which ft.prefetch reads ahead; or leave the step uncompiled, and workers read their own parts"
        )
    if not isinstance(leaf, Tensor):
        got = type(leaf).__name__
        raise TreeError(f"states and batches are trees of tensors, got a leaf that is {got}: see torch.as_tensor")
    return leaf.resolve_conj().resolve_neg()


def _eager(step: Step, state: Any, batch: Tree, donate: bool) -> tuple[Any, Metrics]:
    new, metrics = step.update(state, batch)
    return (taken_over(tree.leaves(state), new, state) if donate and not step.donates else new), metrics


class _Graph:
    """One traced and compiled update, for one signature."""

    def __init__(self, step: Step, state: Any, batch: Tree, donate: bool) -> None:
        flat_state, state_spec = tree.flatten(state)
        flat_batch, batch_spec = tree.flatten(batch)
        size = len(flat_state)
        self.donate = donate
        results: list[Any] = []
        self.written: list[int] = []
        self.replaced: list[int] = []
        in_place = donate

        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            old = leaves[:size]
            new, metrics = step.update(tree.unflatten(state_spec, old), tree.unflatten(batch_spec, leaves[size:]))
            fresh, spec = tree.flatten(new)
            if spec != state_spec:
                raise FunctrainError(f"the step changes the structure of its state: {tree.difference(state, new)}")
            # A leaf that the step hands through (a key, a hyperparameter) is no output of the graph.
            changed = [place for place, (leaf, before) in enumerate(zip(fresh, old)) if leaf is not before]
            measured, form = tree.flatten(metrics)
            results[:] = [form]
            outputs = apart([fresh[place] for place in changed] + measured, leaves)
            self.written = [place for place in changed if in_place and _fits(fresh[place], old[place])]
            self.replaced = [place for place in changed if place not in self.written]
            for place, leaf in zip(changed, outputs):
                if place in self.written:
                    old[place].copy_(leaf)
            places = changed + [-1] * len(measured)
            return tuple(leaf for place, leaf in zip(places, outputs) if place not in self.written)

        self.size = size
        self.state, self.batch = Layout(state), Layout(batch)
        self.batch_kinds = [_kind(leaf) for leaf in flat_batch]
        self.mine: list[tuple[weakref.ref[Tensor], int, int]] = []
        self.memories: set[int] = set()
        self.modes = _modes()
        examples = [*flat_state, *flat_batch]
        graph = traced(flat, examples)
        if donate and hands_on(graph, size):
            # The old buffers are still emptied; the new ones are the graph's own.
            in_place = False
            graph = traced(flat, examples)
        channels_last(graph)
        self.run = lowered(graph, examples)
        self.measured = Layout(tree.unflatten(results[0], [0] * results[0].num_leaves))

    def known(self, state: Any, batch: Tree) -> list[Tensor] | None:
        """The leaves, when the state is the one that this graph gave back last, and the batch one of its kind.

        The kinds of all leaves need not be looked at then: that was 30 of the 294 µs of a small step.
        """
        if not (self.state.written and self.batch.written):
            return None
        leaves, rows = self.state.leaves(state), self.batch.leaves(batch)
        if not self.mine or leaves is None or rows is None:
            return None
        if self.modes != _modes():
            return None
        for (mine, memory, version), leaf in zip(self.mine, leaves):
            same = mine()
            if same is None or same is not leaf or same.data_ptr() != memory or same._version != version:
                return None
        for leaf, kind in zip(rows, self.batch_kinds):
            if not isinstance(leaf, Tensor) or _kind(leaf) != kind or _lazy(leaf) or _tracked(leaf):
                return None
        if self.donate and not self.memories.isdisjoint(map(_memory, rows)):
            return None
        return leaves + rows

    def __call__(self, given: list[Tensor], again: bool = False) -> tuple[Any, Metrics]:
        """One update; `again` when the state's leaves are known to be those that this graph gave back last."""
        leaves = given[: self.size]
        outputs = self.run(given)
        for place in self.written:
            leaves[place] = moved(leaves[place])
        for place, leaf in zip(self.replaced, outputs):
            if self.donate:
                moved(leaves[place])
            leaves[place] = leaf
        self.mine = [(weakref.ref(now), now.data_ptr(), now._version) for now in leaves]
        if self.donate and (self.replaced or not again):
            self.memories = set(map(_memory, leaves))
        return self.state.built(leaves), self.measured.built(list(outputs[len(self.replaced) :]))


def _fits(leaf: Tensor, buffer: Tensor) -> bool:
    # A carry may change its shape from batch to batch: copied into the old buffer it would be broadcast, or cast.
    return leaf.shape == buffer.shape and leaf.dtype == buffer.dtype
