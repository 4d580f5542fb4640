"""Lookahead is the paper's algorithm, however it is run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import keyed_loss, net_batch, net_params
from updating import bowl, run, run_torch

import functrain as ft
from functrain.core import optim
from functrain.testing import check_optimizer, check_step, equal


def ahead(every, share):
    """torch's SGD with momentum running ahead of slow weights."""

    def step(leaves):
        slow = [leaf.numpy().copy() for leaf in leaves]
        fast = torch.optim.SGD(leaves, lr=0.1, momentum=0.9)

        def take(count):
            fast.step()
            if (count + 1) % every == 0:
                for leaf, place in zip(leaves, slow):
                    place += share * (leaf.numpy() - place)
                    leaf.copy_(torch.from_numpy(place))

        return take

    return step


@pytest.mark.parametrize("fused", [False, True])
@given(every=st.integers(1, 7), share=st.floats(0, 0.99))
def test_slow_weights_go_part_of_the_way(fused, every, share):
    params = net_params(0, torch.float64)
    optimizer = optim.lookahead(optim.sgd(0.1, momentum=0.9), every, share)
    got, _ = run(optimizer, params, 15, fused=fused)
    equal("params", got, run_torch(ahead(every, share), params, 15), 1e-12)


def test_at_a_multiple_the_params_are_the_slow_weights():
    optimizer = optim.lookahead(optim.adamw(0.1), 3)
    for fused in (False, True):
        for steps, meet in ((5, False), (6, True)):
            got, state = run(optimizer, net_params(0, torch.float64), steps, fused=fused)
            apart = max((a - b).abs().max().item() for a, b in zip(*map(ft.tree.leaves, (got[-1], state.slow))))
            assert (apart < 1e-12) == meet


def test_the_first_params_stay_the_callers():
    # The slow weights start at them, and are updated in place.
    params = net_params()
    given, optimizer = ft.tree.map(torch.clone, params), optim.lookahead(optim.sgd(0.1), 1)
    optimizer.fused(bowl(params, 0), optimizer.init(given), params)
    equal("given", given, net_params(), 0.0)


def test_the_share_may_be_scheduled_and_set():
    optimizer = optim.lookahead(optim.sgd(1.0), 1, optim.piecewise(0.5, {1: 0.5}))
    got, _ = run(optimizer, torch.zeros(()), 3, lambda params, count: torch.ones(()))
    assert [place.item() for place in got] == [-0.5, -0.75, -1.0]
    state = ft.with_hyper(optim.lookahead(optim.sgd(1.0), 1).init(torch.zeros(())), share=0.25)
    updates, _ = optim.lookahead(optim.sgd(1.0), 1).update(torch.ones(()), state, torch.zeros(()))
    assert updates.item() == -0.25


def test_it_obeys_the_laws_of_optimizers():
    optimizer = optim.lookahead(optim.adamw(0.1), 2)
    check_optimizer(optimizer)
    check_optimizer(optimizer, net_params(0, torch.bfloat16), transforms=False)
    for donate in (False, True):
        step = ft.step(ft.grad(keyed_loss), optimizer, donate=donate)
        check_step(step, net_params(), [net_batch(3, place) for place in range(4)])


def test_refusals():
    for every in (0, -1, 2.0, True):
        with pytest.raises(ft.ArgumentError, match="every must be a whole number of at least 1"):
            optim.lookahead(optim.sgd(0.1), every)
    for share in (-0.1, 1.0, None):
        with pytest.raises(ft.ArgumentError, match="share must be a number in"):
            optim.lookahead(optim.sgd(0.1), share=share)
    with pytest.raises(ft.ArgumentError, match="lookahead: what it is given is no optimizer, got function sgd"):
        optim.lookahead(optim.sgd)
    optimizer = optim.lookahead(optim.sgd(0.1))
    with pytest.raises(ft.TreeError, match="unexpected 'more'"):
        optimizer.update({**net_params(), "more": torch.ones(1)}, optimizer.init(net_params()), net_params())
    more = {**net_params(), "more": torch.ones(1)}
    with pytest.raises(ft.TreeError, match="'more'"):
        optimizer.update(more, optimizer.init(net_params()), more)
