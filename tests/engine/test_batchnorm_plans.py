"""Batch norm and dropout in parallel: shared buffers are threaded and reduced in every plan, and plans agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instances import images
from torch import nn

import functrain as ft
from functrain.testing import check_grad, equal, same_bits


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )


PARAMS, APPLY = ft.functional(network())


def loss(params, batch, *, carry, key):
    scores, carry = APPLY(params, batch["x"], carry=carry, key=key)
    return F.cross_entropy(scores, batch["y"], reduction="none"), carry


def gradient(how, size=11, parts=4, reducer=ft.reduce.mean, **options):
    grad = ft.parallel(ft.grad(loss), parts, reducer, how=how, **options)
    return grad.finished(PARAMS, images(size), carry=APPLY.buffers, key=ft.random.key(1))


@pytest.mark.parametrize("reducer", [ft.reduce.mean, ft.reduce.median, ft.reduce.and_mask(0.5)], ids=repr)
def test_plans_agree_on_gradients_and_buffers(reducer):
    for how in ("threads", "vmap"):
        equal(how, gradient(how, reducer=reducer, workers=2), gradient("loop", reducer=reducer))
    same_bits(
        "exact", gradient("threads", reducer=reducer, workers=3, exact=True), gradient("loop", reducer=reducer, exact=True)
    )


def test_the_buffers_are_the_means_of_the_parts_weighted_by_examples():
    carry = gradient("loop", size=10, parts=3).carry
    key = ft.random.split(ft.random.key(1), 10)
    places = [(0, 4), (4, 7), (7, 10)]
    parts = [ft.tree.map(lambda leaf, a=a, b=b: leaf[a:b], images(10)) for a, b in places]
    own = [ft.grad(loss)(PARAMS, part, carry=APPLY.buffers, key=key[a:b]).carry for part, (a, b) in zip(parts, places)]
    expected = 0.4 * own[0]["1.running_mean"] + 0.3 * own[1]["1.running_mean"] + 0.3 * own[2]["1.running_mean"]
    equal("running mean", carry["1.running_mean"], expected)
    assert carry["1.num_batches_tracked"].item() == 1
    assert APPLY.buffers["1.num_batches_tracked"].item() == 0


def test_the_laws_of_gradients_hold():
    # Not vmapped over params: torch refuses to write batched statistics into buffers that are not (the plan vmap stacks them).
    check_grad(ft.grad(loss), PARAMS, images(5), carry=APPLY.buffers, key=ft.random.key(1), vmap=False)


def test_explain_says_that_the_loss_is_not_additive():
    grad = ft.parallel(ft.grad(loss), 4)
    assert "not additive" in str(ft.explain(grad))
    with pytest.raises(ft.ArgumentError, match="not additive"):
        ft.parallel(ft.grad(loss), 4, how="fused")


def test_a_compiled_step_threads_the_same_buffers_and_masks():
    plain = ft.step(ft.parallel(ft.grad(loss), 2, how="loop"), ft.optim.sgd(0.1))
    compiled = ft.compiled(plain)
    one, other = (step.init(PARAMS, carry=APPLY.buffers, seed=3) for step in (plain, compiled))
    for place in range(3):
        one, _ = plain(one, images(6, place))
        other, _ = compiled(other, images(6, place))
    equal("compiled", other, one)
