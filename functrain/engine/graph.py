"""From a function on tensors to one compiled graph: traced at the level of operators, lowered by torch's inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from functrain.core import tree
from functrain.core.errors import FunctrainError


class NoCompilerError(Exception):
    """There is no C++ compiler that inductor could use."""


def traced(function: Callable[..., Any], examples: list[Tensor]) -> GraphModule:
    """The operators that `function` runs on tensors like `examples`; `FunctrainError` where it looks at their values."""
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


def hands_on(graph: GraphModule, written: int) -> bool:
    """Whether a value that the graph gives out may be nothing but (part of) one of its first `written` inputs, moved or copied.

    Inductor (torch 2.13) takes copies out of a graph, and then reads such a value after the buffer that it came from
    has been written to: a carry of the old params would be that of the new ones. What an operator that is not known to
    compute makes of its inputs counts as moved.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"][:written]
    (given,) = graph.graph.output_node().args
    assert isinstance(given, tuple | list)
    left = [value for value in given if isinstance(value, Node)]
    left += [source for node in graph.graph.nodes if _writes_input(node) and isinstance(source := node.args[1], Node)]
    seen: set[Node] = set()
    while left:
        node = left.pop()
        if node in inputs:
            return True
        writers = [user for user in node.users if _mutates(user)]
        # A copy that is computed with in place afterwards (batch norm's buffers) is another value.
        if node not in seen and not any(map(_computes, (node, *writers))):
            left += [source for one in (node, *writers) for source in one.all_input_nodes]
        seen.add(node)
    return False


def _writes_input(node: Node) -> bool:
    target = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return isinstance(target, Node) and target.op == "placeholder"


# Pointwise by their tags; and x¹ is x.
_COPIES = ("clone", "copy", "copy_", "pow", "_to_copy")
_COMPUTING = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_log_softmax", "_softmax")


def _computes(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    known = {torch.Tag.pointwise, torch.Tag.reduction} if hasattr(torch.Tag, "reduction") else {torch.Tag.pointwise}
    return name not in _COPIES and (name in _COMPUTING or "batch_norm" in name or bool(known & set(node.target.tags)))


def _mutates(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    # Batch norm's operators write to their running statistics, which their schemas do not say.
    return (node.target._schema.is_mutable and not _writes_input(node)) or "batch_norm" in node.target.overloadpacket.__name__


def lowered(graph: GraphModule, examples: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The compiled graph, as a function that empties the list it is given."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    made: list[Any] = []

    def inner(module: GraphModule, inputs: Any, **options: Any) -> Any:
        made.append((module, compile_fx_inner(module, inputs, **options)))
        return made[-1][1]

    try:
        # The signature already fixes sizes and strides: checking them again costs 20 µs a call.
        unchecked = {"size_asserts": False, "alignment_asserts": False}
        with torch.no_grad():
            whole: Any = compile_fx(graph, list(examples), inner_compile=inner, config_patches=unchecked)
    except (InvalidCxxCompiler, InductorError) as error:
        if isinstance(error, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(error):
            raise NoCompilerError(_first_line(error)) from error
        raise
    run = _without_wrappers(made, graph) or (lambda given: whole(*given))

    def call(given: list[Tensor]) -> Sequence[Tensor]:
        # What torch.no_grad does, at a tenth of its cost (2 µs).
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            outputs: Sequence[Tensor] = run(given)
            return outputs
        finally:
            torch._C._set_grad_enabled(before)

    return call


def _without_wrappers(made: list[Any], graph: GraphModule) -> Callable[[list[Tensor]], Any] | None:
    """Inductor's own function, where torch's layers around it (20 µs a call) have nothing to do.

    They have where arguments or results were rearranged: two leaves that are one tensor, results that are arguments.
    """
    if len(made) != 1:
        return None
    module, compiled_graph = made[0]
    run = getattr(compiled_graph, "current_callable", None)
    arguments = [sum(node.op == "placeholder" for node in one.graph.nodes) for one in (module, graph)]
    results = [len(tree.leaves(one.graph.output_node().args)) for one in (module, graph)]
    return run if callable(run) and arguments[0] == arguments[1] and results[0] == results[1] else None
