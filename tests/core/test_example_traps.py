"""Losses on which examples' gradients by layer algebra once went wrong: each against one example after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instances import random_tree

import functrain as ft
from functrain.testing import equal

D = torch.float64


def shared_bias(params, batch):
    return F.linear(batch, params["w"], params["b"]).square().sum(1)


def shared_addmm(params, batch):
    return torch.addmm(params["b"], batch, params["w"].T).square().sum(1)


def latents(params, batch):
    read = F.scaled_dot_product_attention(params["l"] * 1.0, F.linear(batch, params["w"]), batch)
    return read.square().sum((1, 2, 3))


def view_then_in_place(params, batch):
    y = F.conv2d(batch, params["c"])
    v = y.flatten(1)
    y.relu_()
    return v.square().sum(1)


def product_then_in_place(params, batch):
    y = params["w"] @ batch.mT
    v = y.flatten(1)
    y.relu_()
    return v.square().sum(1)


def empty_leaf(params, batch):
    return (batch @ params["w"]).square().sum(1) + params["none"].sum()


CASES = {
    "a bias of one number": (shared_bias, {"w": (4, 3), "b": (1,)}, (5, 3)),
    "a bias of a row": (shared_bias, {"w": (4, 3), "b": (1, 4)}, (5, 3)),
    "a 0-d bias": (shared_bias, {"w": (4, 3), "b": ()}, (5, 3)),
    "addmm of one number": (shared_addmm, {"w": (4, 3), "b": (1,)}, (5, 3)),
    "latents, as many heads as examples": (latents, {"w": (6, 6), "l": (1, 3, 6)}, (4, 4, 5, 6)),
    "a convolution's view, written to": (view_then_in_place, {"c": (3, 1, 3, 3)}, (4, 1, 5, 5)),
    "a product's view, written to": (product_then_in_place, {"w": (4, 3)}, (5, 2, 3)),
    "a leaf without numbers": (empty_leaf, {"w": (3, 2), "none": (0, 3)}, (5, 3)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["as it is", "channels last"])
def test_they_are_those_of_one_example_after_the_other(name, layout):
    loss, shapes, size = CASES[name]
    params, batch = random_tree(shapes, 1, D), random_tree(size, 2, D)
    if layout == "channels last":
        batch = batch.transpose(-1, -2).contiguous().transpose(-1, -2)
    together = ft.example_grads(ft.grad(loss), params, batch)
    alone = [ft.grad(loss)(params, one.contiguous()) for one in ft.tree.divide(batch, len(batch))]
    equal("grads", together.grads, ft.tree.stack([one.grads for one in alone]))
    equal("loss", together.loss, torch.stack([one.loss for one in alone]))
    clipped = ft.parallel(ft.grad(loss), 2, ft.reduce.clip_per_example(1.0)).finished(params, batch)
    for leaf, param in zip(ft.tree.leaves(clipped.grads), ft.tree.leaves(params)):
        assert leaf.shape == param.shape


@pytest.mark.parametrize("positions", [None, 4])
def test_norms_beyond_what_squares_can_hold_are_clipped_to_the_direction(positions):
    def steep(params, batch):
        return (batch @ params["w"]).flatten(1).sum(1) * 1e25

    params = {"w": torch.ones(6, 4)}
    batch = random_tree((3, 6) if positions is None else (3, positions, 6), 0)
    reducer = ft.reduce.clip_per_example(1.0)
    taken = ft.parallel(ft.grad(steep), 1, reducer)(params, batch)
    ones = [reducer.lift(ft.grad(steep)(params, one)) for one in ft.tree.divide(batch, 3)]
    equal("by hand", taken.grads, ft.tree_reduce(ft.reduce.add, ones).grads)
    assert taken.grads["w"].abs().max() > 0.1


def test_what_is_no_gradient_budget_or_param_is_said_so():
    params, batch = {"w": torch.ones(3, 2)}, torch.ones(4, 3)

    def loss(params, batch):
        return (batch @ params["w"]).sum(1)

    with pytest.raises(ft.ArgumentError, match=r"ft.grad\(loss\)"):
        ft.example_grads(loss, params, batch)
    for budget in (0, -1, 1.5, True, "1"):
        with pytest.raises(ft.ArgumentError, match="budget"):
            ft.example_grads(ft.grad(loss), params, batch, budget=budget)
    for wrong in ({"w": torch.ones(3, 2), "rate": 0.1}, {"w": torch.ones(3, 2, dtype=torch.complex64)}):
        with pytest.raises(ft.TreeError, match="floating"):
            ft.example_grads(ft.grad(loss), wrong, batch)
    with pytest.raises(ft.TreeError, match="empty tree"):
        ft.example_grads(ft.grad(loss), {}, batch)
