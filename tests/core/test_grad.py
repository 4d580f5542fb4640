"""grad: torch's own gradients, wherever it is called."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import net_batch, net_loss, net_params, random_tree

import functrain as ft
from functrain.testing import equal, same_bits


def square(params, batch):
    return (batch["x"] @ params["w"]).square()


PARAMS = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
BATCH = {"x": random_tree((5, 3), 0, torch.float64)}
SUM_OF_SQUARES = 2 * BATCH["x"].T @ BATCH["x"]


def test_it_nests_under_every_transform():
    take = ft.grad(square)

    def grads(w):
        return take({"w": w}, BATCH).grads["w"]

    w = PARAMS["w"]
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        equal("jacobian of the gradient", jacobian(grads)(w), SUM_OF_SQUARES)
    equal("hessian of the loss", torch.func.hessian(lambda w: take({"w": w}, BATCH).loss)(w), SUM_OF_SQUARES)
    stacked = torch.stack([w, 2 * w, 3 * w])
    equal("vmap over params", torch.func.vmap(grads)(stacked), stacked @ SUM_OF_SQUARES)
    one = torch.func.vmap(lambda x: take(PARAMS, {"x": x[None]}).grads["w"])(BATCH["x"])
    equal("vmap over examples", one.sum(0), grads(w))
    both = torch.func.vmap(torch.func.jacrev(grads))(stacked)
    equal("vmap of a jacobian", both, SUM_OF_SQUARES.expand(3, 3, 3))


def test_it_can_be_differentiated_by_autograd():
    w = PARAMS["w"].clone().requires_grad_()
    ft.grad(square)({"w": w}, BATCH).grads["w"].sum().backward()
    equal("params", w.grad, SUM_OF_SQUARES.sum(0))
    x = BATCH["x"].clone().requires_grad_()
    ft.grad(square)(PARAMS, {"x": x}).grads["w"].sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not ft.grad(square)({"w": w}, BATCH).grads["w"].requires_grad


@given(size=st.integers(1, 6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_nothing_that_comes_back_tracks_gradients(size, dtype):
    for call in (ft.grad(net_loss), ft.grad(net_loss).finished):
        taken = call(net_params(0, dtype), net_batch(size, 0, dtype))
        assert not any(leaf.requires_grad for leaf in ft.tree.leaves(taken))
        assert taken.weight.dtype == torch.float64
        assert taken.loss.dtype == dtype


def test_params_that_the_loss_does_not_use_get_zeros():
    params = PARAMS | {"idle": torch.ones(2, dtype=torch.float64)}
    for taken in (
        ft.grad(square)(params, BATCH).grads,
        torch.func.vmap(lambda x: ft.grad(square)(params, {"x": x[None]}).grads)(BATCH["x"]),
    ):
        assert not taken["idle"].any()
    nothing = ft.grad(lambda params, batch: batch["x"].sum(1))(params, BATCH)
    same_bits("no params at all", nothing.grads, ft.tree.map(torch.zeros_like, params))


def test_weights_of_a_prefix_count_each_loss():
    def loss(params, batch):
        return (batch["x"] * params["w"]).square(), batch["x"][:, 0].abs()

    taken = ft.grad(loss)(PARAMS, BATCH)
    weights = BATCH["x"][:, 0].abs()
    equal("weight", taken.weight, 3 * weights.sum())
    equal("loss", taken.loss, ((BATCH["x"] * PARAMS["w"]).square() * weights[:, None]).sum())


def test_keys_of_examples_may_be_given():
    def loss(params, batch, *, key):
        assert key.shape == (5,)
        return square(params, {"x": ft.random.dropout(batch["x"], 0.5, key)})

    key = ft.random.key(3)
    same_bits("split", ft.grad(loss)(PARAMS, BATCH, key=ft.random.split(key, 5)), ft.grad(loss)(PARAMS, BATCH, key=key))
    with pytest.raises(ft.ArgumentError, match=r"shape \(4,\), the batch has N = 5"):
        ft.grad(loss)(PARAMS, BATCH, key=ft.random.split(key, 4))
