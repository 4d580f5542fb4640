"""Convolutions over one channel inside a graph: another layout, the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import functrain as ft
from functrain.engine.channels import channels_last
from functrain.engine.graph import traced
from functrain.testing import equal

ATEN = torch.ops.aten


def gradient(images, kernel, bias, weight):
    def loss(params, batch):
        maps = F.conv2d(batch, params["kernel"], params["bias"], padding=1)
        # A view of the result, which has to lie as it did.
        return maps.view(len(batch), -1).relu() @ params["weight"]

    params = {"kernel": kernel, "bias": bias, "weight": weight}
    taken = ft.grad(loss).finished(params, images)
    return (*ft.tree.leaves(taken.grads), taken.loss)


@pytest.mark.parametrize(("channels", "changed"), [(1, True), (3, False)])
def test_kernels_over_one_channel_are_given_it_last(channels, changed):
    torch.manual_seed(0)
    given = [torch.randn(4, channels, 6, 5), torch.randn(2, channels, 3, 3), torch.randn(2), torch.randn(60)]
    graph = traced(gradient, given)
    expected = graph(*given)
    channels_last(graph)
    both = ATEN.convolution.default, ATEN.convolution_backward.default
    kernels = [node for node in graph.graph.nodes if node.target in both]
    assert len(kernels) == 2
    for node in kernels:
        place = int(node.target is ATEN.convolution_backward.default)
        assert [part.target is ATEN.as_strided.default for part in node.args[place : place + 2]] == [changed, changed]
    equal("the same gradients", graph(*given), expected)
