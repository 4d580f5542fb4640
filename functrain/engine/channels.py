"""Convolutions over one channel, in the memory layout that a CPU is fast in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


def channels_last(graph: GraphModule) -> None:
    """Tell the kernels of such convolutions that their channels come last, which one channel does in any case.

    Inductor sees to it for convolutions of several channels. Images of one have strides that read both ways, are taken for
    channels first, and their convolutions run two to four times slower, forward and backward (oneDNN, torch 2.13).
    """
    found = False
    for node in list(graph.graph.nodes):
        place = {_FORWARD: 0, _BACKWARD: 1}.get(node.target) if node.op == "call_function" else None
        if place is None or not _is_one_channel(*(_value(part) for part in node.args[place : place + 2])):
            continue
        found = True
        with graph.graph.inserting_before(node):
            for position in (place, place + 1):
                node.update_arg(position, _last(graph, node.args[position]))
        if node.target is _FORWARD:
            _first_again(graph, node)
    if found:
        graph.recompile()


def _value(part: object) -> Tensor | None:
    return part.meta.get("val") if isinstance(part, Node) else None


def _is_one_channel(images: Tensor | None, weight: Tensor | None) -> bool:
    both = [leaf for leaf in (images, weight) if leaf is not None]
    return len(both) == 2 and all(
        leaf.device.type == "cpu" and leaf.ndim == 4 and leaf.shape[1] == 1 and leaf.is_contiguous() for leaf in both
    )


def _last(graph: GraphModule, images: Node) -> Node:
    *_, height, width = (shape := images.meta["val"].shape)
    made = graph.graph.call_function(torch.ops.aten.as_strided.default, (images, list(shape), [height * width, 1, width, 1]))
    made.meta["val"] = images.meta["val"]
    return made


def _first_again(graph: GraphModule, node: Node) -> None:
    # What was traced after it took the result for a contiguous one (a view may be of it).
    with graph.graph.inserting_after(node):
        plain = graph.graph.call_function(
            torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
        )
        plain.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(plain, delete_user_cb=lambda user: user is not plain)
