"""Law 16: a prediction does not depend on what else is in the batch, and neither does an example's own gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import convolutional, images, net, net_batch, net_params, random_tree
from torch import nn

import functrain as ft
from functrain.core.examples import example_grads
from functrain.testing import LawError, check_batch_mates, equal

NORMS = {
    "batch norm": nn.BatchNorm2d(4),
    "group norm": nn.GroupNorm(2, 4),
    "instance norm": nn.InstanceNorm2d(4, track_running_stats=True),
    "layer norm": nn.LayerNorm([4, 6, 6]),
}


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))


@pytest.mark.parametrize("name", NORMS)
def test_predictions_of_a_trained_network(name):
    params, apply = ft.functional(network(NORMS[name]))
    carry = apply.buffers

    def loss(params, batch, *, carry, key):
        scores, carry = apply(params, batch["x"], carry=carry, key=key)
        return nn.functional.cross_entropy(scores, batch["y"], reduction="none"), carry

    step = ft.step(ft.parallel(ft.grad(loss), 2), ft.optim.sgd(0.1))
    state = step.init(params, carry=carry)
    for place in range(3):
        state, _ = step(state, images(6, place))
    check_batch_mates(lambda x: apply.eval()(state.params, x, carry=state.carry)[0], images(7)["x"])


@given(size=st.integers(2, 9), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_predictions_of_a_network_of_tensors(size, seed, dtype):
    params = net_params(seed, dtype)
    check_batch_mates(lambda x: net(params, x), net_batch(size, seed, dtype)["x"], seed=seed)


def test_predictions_of_a_recurrent_network_and_of_attention():
    torch.manual_seed(0)
    params, apply = ft.functional(nn.LSTM(3, 5, batch_first=True))
    check_batch_mates(lambda x: apply(params, x)[0], random_tree((4, 6, 3), 0))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    params, attend = ft.functional(layer)
    check_batch_mates(lambda x: attend.eval()(params, x), random_tree((4, 6, 8), 1))


def test_the_checker_finds_models_that_look_at_their_batch():
    params, apply = ft.functional(network(nn.BatchNorm2d(4)))
    key = ft.random.key(0)
    with pytest.raises(LawError, match="batch-mates"):
        check_batch_mates(lambda x: apply.train()(params, x, carry=apply.buffers, key=key)[0], images(6)["x"])
    with pytest.raises(LawError, match="batch-mates"):
        check_batch_mates(lambda x: x.transpose(0, 1).reshape(x.shape), random_tree((4, 3), 0))
    with pytest.raises(ft.ArgumentError, match="batch of 1"):
        check_batch_mates(lambda x: x, torch.ones(1, 2))


@settings(max_examples=8)
@given(size=st.integers(2, 7), seed=st.integers(0, 9), budget=st.sampled_from([None, 1, 5000]))
def test_gradients_of_single_examples(size, seed, budget):
    """What clipping and privacy rest on: one example's gradient is the same alone and among others."""
    params, loss = convolutional()
    batch, keys = images(size, seed), ft.random.split(ft.random.key(seed), size)
    together = example_grads(ft.grad(loss), params, batch, key=keys, budget=budget)
    for place in range(size):
        alone = ft.grad(loss)(params, ft.tree.divide(batch, size)[place], key=keys[place : place + 1])
        equal("alone", alone.grads, ft.tree.map(lambda leaf, place=place: leaf[place], together.grads))
