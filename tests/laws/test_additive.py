"""Law 1: for a linear reducer a gradient over parts is the gradient of the whole, in every plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    PLANS,
    REDUCERS,
    carried_loss,
    carried_start,
    convolutional,
    images,
    keyed_loss,
    net_batch,
    net_loss,
    net_params,
    plain_loss,
    random_tree,
    recurrent,
)

import functrain as ft
from functrain.testing import LawError, check_grad, equal

LOSSES = {"weights and aux": net_loss, "plain (N, 2)": plain_loss, "keyed": keyed_loss}
DTYPES = st.sampled_from([torch.float32, torch.float64])


LINEAR = {name: reducer for name, reducer in REDUCERS.items() if reducer.linear}
OF_EXAMPLES = {name: reducer for name, reducer in REDUCERS.items() if reducer.scale is not None}


@pytest.mark.parametrize("reducer", LINEAR.values(), ids=list(LINEAR))
@pytest.mark.parametrize("name", LOSSES)
@given(size=st.integers(1, 13), parts=st.integers(1, 9), how=st.sampled_from(PLANS), dtype=DTYPES, seed=st.integers(0, 9))
def test_parts_add_up_to_the_whole(name, reducer, size, parts, how, dtype, seed):
    params, batch = net_params(seed, dtype), net_batch(size, seed, dtype)
    key = ft.random.key(seed) if name == "keyed" else None
    whole = ft.grad(LOSSES[name])
    parallel = ft.parallel(whole, parts, reducer, how=how, workers=2)
    equal("unfinished", parallel(params, batch, key=key), whole(params, batch, key=key))
    expected = reducer.finish(whole(params, batch, key=key))
    equal("finished", parallel.finished(params, batch, key=key), expected)


@pytest.mark.parametrize("reducer", OF_EXAMPLES.values(), ids=list(OF_EXAMPLES))
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12)
@given(size=st.integers(1, 9), parts=st.integers(1, 9), how=st.sampled_from(PLANS), seed=st.integers(0, 9))
def test_parts_add_up_where_the_sum_is_over_examples(name, reducer, size, parts, how, seed):
    params, batch, key = net_params(seed, torch.float64), net_batch(size, seed, torch.float64), ft.random.key(seed)
    keys = ft.random.split(key, size) if name == "keyed" else None
    whole = ft.grad(LOSSES[name])
    ones = [
        reducer.lift(whole(params, one, key=None if keys is None else keys[place : place + 1]))
        for place, one in enumerate(ft.tree.divide(batch, size))
    ]
    expected = reducer.finished(ft.tree_reduce(reducer.merge, ones), key)
    parallel = ft.parallel(whole, parts, reducer, how=how, workers=2, budget=2000)
    equal("example by example", parallel.finished(params, batch, key=key), expected)


@given(size=st.integers(1, 9), seed=st.integers(0, 9))
def test_the_mean_is_the_gradient_of_the_weighted_mean(size, seed):
    params, batch = net_params(seed, torch.float64), net_batch(size, seed, torch.float64)
    leaves, spec = ft.tree.flatten(params)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    losses = net_loss(ft.tree.unflatten(spec, leaves), batch)
    mean = (losses.losses * losses.weights).sum() / losses.weights.sum()
    grads = ft.tree.unflatten(spec, list(torch.autograd.grad(mean, leaves)))
    taken = ft.grad(net_loss).finished(ft.tree.map(torch.Tensor.detach, params), batch)
    equal("mean", (taken.grads, taken.loss), (grads, mean))
    equal("aux", taken.aux["size"], (losses.aux["size"] * losses.weights).sum() / losses.weights.sum())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_obey_their_laws(name):
    key = ft.random.key(3) if name == "keyed" else None
    check_grad(ft.grad(LOSSES[name]), net_params(1, torch.float64), net_batch(7, 1, torch.float64), key=key)


def test_a_shared_carry_agrees_among_the_unfused_plans():
    params, batch = net_params(1, torch.float64), net_batch(7, 1, torch.float64)
    check_grad(ft.grad(carried_loss), params, batch, carry=carried_start(torch.float64))


def test_convolution_with_dropout_obeys_the_laws_of_gradients():
    params, loss = convolutional()
    check_grad(ft.grad(loss), params, images(5), key=ft.random.key(1))


@settings(max_examples=10)
@given(size=st.integers(1, 5), parts=st.integers(1, 4), how=st.sampled_from(["loop", "threads", "fused"]))
def test_lanes_of_recurrent_state_are_cut_with_the_batch(size, parts, how):
    params, loss, start = recurrent()
    batch = random_tree({"x": (size, 5, 3), "y": (size, 5, 2)}, 4)
    whole = ft.tbptt(ft.grad(loss), 2, start)
    equal("lanes", ft.parallel(whole, parts, how=how, workers=2)(params, batch), whole(params, batch))


def test_parallel_in_parallel_and_accumulate_are_the_whole():
    params, batch = net_params(0, torch.float64), net_batch(11, 0, torch.float64)
    whole = ft.grad(net_loss)
    for nested in (
        ft.parallel(ft.parallel(whole, 2, how="loop"), 3, how="loop"),
        ft.parallel(ft.accumulate(whole, 2), 3, how="vmap"),
        ft.accumulate(ft.parallel(whole, 2, how="fused"), 3),
    ):
        equal("nested", nested.finished(params, batch), whole.finished(params, batch))


def test_the_checker_finds_a_loss_that_is_not_additive():
    def centred(params, batch):
        return (net(params, batch) - net(params, batch).mean()).square()

    def net(params, batch):
        return batch @ params["w"]

    with pytest.raises(LawError, match="parts"):
        check_grad(ft.grad(centred), {"w": torch.ones(2)}, random_tree((6, 2), 0))
