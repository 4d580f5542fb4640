"""Law 6, of a step: stop after any step, keep the state as bytes, go on: the same bits as never having stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    OPTIMIZERS,
    PLANS,
    SCHEDULES,
    carried_loss,
    carried_start,
    convolutional,
    images,
    keyed_loss,
    net_batch,
    net_loss,
    net_params,
    random_tree,
    recurrent,
)

import functrain as ft
from functrain.testing import LawError, check_step, same_bits

DTYPES = [torch.float32, torch.float64]


def batches(sizes, seed=0, dtype=torch.float32):
    return [net_batch(size, seed + place, dtype) for place, size in enumerate(sizes)]


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=5)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rate=st.sampled_from(list(SCHEDULES)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(-(2**70), 2**70),
)
def test_every_optimizer_resumes(name, donate, sizes, rate, dtype, seed):
    step = ft.step(ft.grad(keyed_loss), OPTIMIZERS[name](SCHEDULES[rate](0.01)), donate=donate)
    check_step(step, step.init(net_params(1, dtype), seed=seed), batches(sizes, 0, dtype))


@pytest.mark.parametrize("how", PLANS)
@settings(max_examples=5)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), parts=st.integers(1, 5))
def test_every_plan_resumes(how, sizes, parts):
    grad = ft.parallel(ft.grad(keyed_loss), parts, how=how, workers=2)
    check_step(ft.step(grad, ft.optim.adam(0.01)), net_params(), batches(sizes))


@pytest.mark.parametrize("how", ["vmap", "threads", "loop"])
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_carry_resumes(how, donate):
    grad = ft.parallel(ft.grad(carried_loss), 2, how=how, workers=2)
    step = ft.step(grad, ft.optim.adamw(0.01), donate=donate)
    check_step(step, step.init(net_params(), carry=carried_start()), batches([5, 3, 4]))


def test_modules_resume():
    params, loss = convolutional()
    check_step(ft.step(ft.grad(loss), ft.optim.adam(0.01)), params, [images(4, place) for place in range(3)])
    params, loss, start = recurrent()
    sequences = [random_tree({"x": (3, 5, 3), "y": (3, 5, 2)}, place) for place in range(3)]
    check_step(ft.step(ft.tbptt(ft.grad(loss), 2, start), ft.optim.adam(0.01)), params, sequences)


def test_combinators_resume():
    step = ft.step(ft.grad(keyed_loss), ft.optim.adam(ft.optim.cosine(0.01, 9)))
    stacked = [ft.tree.stack(batches([3, 3], 10 * place)) for place in range(3)]
    check_step(ft.repeat(step, 2), net_params(), stacked)
    members = ft.population(step)
    start = members.init([step.init(net_params(seed), seed=seed) for seed in range(3)])
    check_step(members, start, batches([4, 2, 4]))


def test_a_step_moves_the_position_alone_of_what_it_does_not_train():
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    start = step.init(net_params(), seed=5)
    state, _ = step(start, net_batch(3))
    assert state.position == 1
    same_bits("key", state.key, start.key)


def test_the_start_is_a_copy():
    params = net_params()
    before = ft.tree.map(torch.clone, params)
    step = ft.step(ft.grad(net_loss), ft.optim.adam(0.1), donate=True)
    state = step.init(params)
    for place in range(3):
        state, _ = step(state, net_batch(4, place))
    same_bits("params that were given", params, before)


def test_the_checker_finds_steps_that_are_not_functions_of_their_state():
    inner = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    calls = []

    def counting(state, batch):
        calls.append(1)
        new, metrics = inner(state, batch)
        return new, metrics | {"loss": metrics["loss"] * len(calls)}

    def writing(state, batch):
        batch["x"].mul_(0.5)
        return inner(state, batch)

    def keeping(state, batch):
        state.params["scale"].add_(1)
        return inner(state, batch)

    for broken, law in ((counting, "resumed"), (writing, "the batch"), (keeping, "the state given")):
        with pytest.raises(LawError, match=law):
            check_step(dataclasses.replace(inner, update=broken), net_params(), batches([3, 3]))
    with pytest.raises(LawError, match="DonatedError"):
        check_step(dataclasses.replace(inner, donates=True), net_params(), batches([3]))
