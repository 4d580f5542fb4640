"""A step as one compiled graph, its state updated in place."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from functrain.core import tree
from functrain.core.deferred import Deferred
from functrain.core.errors import ArgumentError, FunctrainError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.step import Metrics, Step, apart, check_owned, moved, taken_over
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree


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
    latest: list[_Graph] = []
    eager = False

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        nonlocal eager
        if inside_tracing() or inside_transform():
            # A compiler or transform around this one takes the step as it is.
            return step.update(state, batch)
        check_owned(state)
        if eager:
            return _eager(step, state, batch, donate)
        given, given_spec = tree.flatten((state, batch))
        if latest and latest[-1].knows(given_spec, given):
            return latest[-1](given)
        given = [leaf if isinstance(leaf, Tensor) and not _lazy(leaf) else _resolved(leaf) for leaf in given]
        signature = (given_spec, *map(_kind, given))
        graph = graphs.get(signature)
        if graph is None:
            try:
                # Tracing and inductor patch what is global: two threads at once would corrupt each other's graphs.
                with _COMPILING:
                    graph = graphs.get(signature)
                    if graph is None:
                        whole, part = tree.unflatten(given_spec, given)
                        graph = graphs[signature] = _Graph(step, whole, part, donate)
            except _NoCompilerError as error:
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

    return Step(step.init, update, stage, donate, step.grad, lambda grad: compiled(step.remade(grad), donate=donate))


def _in_graph(stage: Stage) -> Stage:
    """What a step says of itself, without what holds only outside a graph."""
    facts = {name: text for name, text in stage.facts.items() if name not in ("state", "update", "workers")}
    if facts.get("plan", "").startswith("threads"):
        facts["plan"] = "loop (threads are looped inside a graph)"
    return Stage(stage.title, facts, [_in_graph(inner) for inner in stage.inner])


_COMPILING = threading.Lock()


def _kind(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


def _lazy(leaf: Tensor) -> bool:
    return leaf.is_conj() or leaf.is_neg()


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


class _NoCompilerError(Exception):
    pass


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
        self.results: Any = None
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
            measured, self.results = tree.flatten(metrics)
            outputs = apart([fresh[place] for place in changed] + measured, leaves)
            self.written = [place for place in changed if in_place and _fits(fresh[place], old[place])]
            self.replaced = [place for place in changed if place not in self.written]
            for place, leaf in zip(changed, outputs):
                if place in self.written:
                    old[place].copy_(leaf)
            places = changed + [-1] * len(measured)
            return tuple(leaf for place, leaf in zip(places, outputs) if place not in self.written)

        self.spec, self.size = state_spec, size
        self.given_spec = tree.structure((state, batch))
        self.batch_kinds = [_kind(leaf) for leaf in flat_batch]
        self.mine: list[weakref.ref[Tensor]] = []
        examples = [*flat_state, *flat_batch]
        graph = _traced(flat, examples)
        if donate and _hands_on(graph):
            # The old buffers are still emptied; the new ones are the graph's own.
            in_place = False
            graph = _traced(flat, examples)
        self.run = _compile(graph, examples)

    def knows(self, spec: Any, given: list[Any]) -> bool:
        """Whether the state is the one that this graph gave back last, and the batch one of its kind.

        The kinds of all leaves need not be looked at then: that was 30 of the 294 µs of a small step.
        """
        if not self.mine or spec != self.given_spec:
            return False
        if not all(mine() is leaf for mine, leaf in zip(self.mine, given)):
            return False
        return all(
            isinstance(leaf, Tensor) and _kind(leaf) == kind and not _lazy(leaf)
            for leaf, kind in zip(given[self.size :], self.batch_kinds)
        )

    def __call__(self, given: list[Tensor]) -> tuple[Any, Metrics]:
        with torch.no_grad():
            outputs = list(self.run(*given))
        leaves = given[: self.size]
        for place in self.written:
            leaves[place] = moved(leaves[place])
        for place, leaf in zip(self.replaced, outputs):
            if self.donate:
                moved(leaves[place])
            leaves[place] = leaf
        self.mine = list(map(weakref.ref, leaves))
        return tree.unflatten(self.spec, leaves), tree.unflatten(self.results, outputs[len(self.replaced) :])


def _fits(leaf: Tensor, buffer: Tensor) -> bool:
    # A carry may change its shape from batch to batch: copied into the old buffer it would be broadcast, or cast.
    return leaf.shape == buffer.shape and leaf.dtype == buffer.dtype


def _traced(function: Callable[..., Any], examples: list[Tensor]) -> GraphModule:
    # Traced at the level of operators and given to inductor directly: no guards are checked at each call
    # (233 µs against 301 µs by torch.compile for an MLP of 64-128-128-10), and no Python feature is out of bounds.
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # On tensors without values: a loss that looks at one fails here, where with values it would become a constant.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad():
            return make_fx(function)(*map(mode.from_tensor, examples))
    except RuntimeError as error:
        looks = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
        if not looks and not any(text in str(error) for text in _LOOKS):
            raise
        raise FunctrainError(
            "the step is not one graph, it reads the value of a tensor (an if, float(), .item(), .tolist(), .numpy() or a "
            f"boolean mask in the loss): use torch.where or weights, or run the step uncompiled ({_first_line(error)})"
        ) from error


_LOOKS = ("tracing tensor", "data-dependent", "not supported for tensor subclasses", "Cannot access data pointer")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _hands_on(graph: GraphModule) -> bool:
    """Whether a value that the graph gives out is nothing but (part of) one of its inputs, moved or copied.

    Inductor (torch 2.13) takes copies out of a graph, and then reads such a value after the buffer that it came from
    has been written to: a carry of the old params would be that of the new ones.
    """
    (given,) = graph.graph.output_node().args
    assert isinstance(given, tuple | list)
    values = [*given, *(node.args[1] for node in graph.graph.nodes if _writes_input(node))]
    return any(_origin(value).op == "placeholder" for value in values if isinstance(value, Node))


def _writes_input(node: Node) -> bool:
    target = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return isinstance(target, Node) and target.op == "placeholder"


_COPIES = ("clone", "_to_copy", "lift_fresh_copy", "constant_pad_nd", "pow", "_unsafe_view")


def _origin(node: Node) -> Node:
    while isinstance(node.target, OpOverload):
        name = node.target.overloadpacket.__name__
        if name in ("copy", "copy_"):
            source = node.args[1]
        elif name == "cat":
            (source,) = found if isinstance(found := node.args[0], list | tuple) and len(found) == 1 else (None,)
        elif name in _COPIES or node.target.is_view:
            source = node.args[0]
        else:
            break
        # A copy that is written to afterwards (batch norm's buffers) is another value.
        if not isinstance(source, Node) or any(_mutates(user) for user in node.users):
            break
        node = source
    return node


def _mutates(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    # Batch norm's operators write to their running statistics, which their schemas do not say.
    return (node.target._schema.is_mutable and not _writes_input(node)) or "batch_norm" in node.target.overloadpacket.__name__


def _compile(graph: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        # The signature already fixes sizes and strides: checking them again costs 20 µs a call.
        unchecked = {"size_asserts": False, "alignment_asserts": False}
        with torch.no_grad():
            return torch._inductor.compile(graph, list(examples), options=unchecked)
    except (InvalidCxxCompiler, InductorError) as error:
        if isinstance(error, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(error):
            raise _NoCompilerError(_first_line(error)) from error
        raise
