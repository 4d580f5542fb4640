"""Keyed randomness is the same for the same position, whoever computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import PLANS, random_tree
from torch import nn

import functrain as ft
from functrain.testing import equal, same_bits

LAYERS = {
    "Dropout": (nn.Dropout(0.4), (6,)),
    "Dropout1d": (nn.Dropout1d(0.4), (4, 3)),
    "Dropout2d": (nn.Dropout2d(0.4), (4, 2, 2)),
    "Dropout3d": (nn.Dropout3d(0.4), (4, 2, 2, 2)),
    "twice": (nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.2)), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=10)
@given(size=st.integers(1, 9), parts=st.integers(1, 5), how=st.sampled_from(PLANS), seed=st.integers(0, 99))
def test_masks_do_not_depend_on_the_plan(name, size, parts, how, seed):
    layer, shape = LAYERS[name]
    batch, key = torch.ones(size, *shape), ft.random.key(seed)
    _, apply = ft.functional(layer)
    whole = apply({}, batch, key=ft.random.split(key, size))
    seen = []

    def loss(params, batch, *, key):
        kept = apply({}, batch, key=key)
        seen.append(kept)
        return kept.flatten(1).sum(1) * params

    taken = ft.parallel(ft.grad(loss), parts, how=how, workers=2)(torch.tensor(1.0), batch, key=key)
    equal("their sum", taken.grads, whole.sum())
    if how in ("fused", "loop"):
        same_bits("masks", torch.cat([kept.detach() for kept in seen]), whole)


@settings(max_examples=10)
@given(position=st.integers(0, 1000), seed=st.integers(0, 99), parts=st.integers(1, 4))
def test_the_same_position_has_the_same_randomness(position, seed, parts):
    def loss(params, batch, *, key):
        noisy = batch + ft.random.normal(key, (3,))
        return (noisy * params).square().sum(1)

    batch = random_tree((5, 3), seed)
    ends = []
    for how in PLANS:
        step = ft.step(ft.parallel(ft.grad(loss), parts, how=how, workers=2), ft.optim.sgd(0.01))
        state = step.init(torch.ones(3), seed=seed)._replace(position=torch.tensor(position))
        ends.append(step(state, batch)[0].params)
    for end in ends[1:]:
        equal("plans", end, ends[0])
    other, _ = step(state._replace(position=torch.tensor(position + 1)), batch)
    assert not torch.equal(other.params, ends[-1])


def test_augmentation_and_noise_are_the_same_compiled():
    def loss(params, batch, *, key):
        flip = ft.random.uniform(key) < 0.5
        seen = torch.where(flip[:, None], batch.flip(1), batch) + 0.1 * ft.random.normal(ft.random.fold_in(key, 1), (4,))
        return (seen * params).sum(1).square()

    step = ft.step(ft.parallel(ft.grad(loss), 2), ft.optim.sgd(0.01))
    compiled = ft.compiled(step, donate=False)
    state, batch = step.init(torch.ones(4), seed=4), random_tree((6, 4), 1)
    equal("compiled", compiled(state, batch), step(state, batch))
