"""Law 8: member k of a population is the run of its own state alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    OPTIMIZERS,
    RATES,
    carried_loss,
    carried_start,
    convolutional,
    images,
    keyed_loss,
    net_batch,
    net_loss,
    net_params,
)

import functrain as ft
from functrain.testing import equal


def check_members(step, members, batches, run=None):
    """Run members together and each alone; `run`: how the population's step is run."""
    together = ft.population(step)
    update = run(together) if run else together
    state = together.init(members)
    for batch in batches:
        state, metrics = update(state, batch)
        alone = [step(member, batch) for member in members]
        members = [new for new, _ in alone]
        for place, (member, (new, measured)) in enumerate(zip(ft.tree.unstack(state), alone)):
            equal(f"member {place}", (member, {n: m[place] for n, m in metrics.items()}), (new, measured))


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=6)
@given(
    rate=st.sampled_from(list(RATES)),
    rates=st.lists(st.floats(1e-3, 0.1), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_members_differ_in_rate_seed_and_params(name, rate, rates, sizes):
    step = ft.step(ft.grad(keyed_loss), OPTIMIZERS[name](RATES[rate](0.05)))
    number = {"number": "lr", "constant": "lr_value", "cosine": "lr_peak", "warmup": "lr_value"}.get(rate)
    number = number or {"warmup cosine": "lr_peak", "piecewise": "lr_start"}[rate]
    members = [
        ft.with_hyper(step.init(net_params(seed, torch.float64), seed=seed), **{number: lr}) for seed, lr in enumerate(rates)
    ]
    check_members(step, members, [net_batch(size, place, torch.float64) for place, size in enumerate(sizes)])


def test_members_have_their_own_carry():
    step = ft.step(ft.grad(carried_loss), ft.optim.adam(0.05))
    members = [step.init(net_params(0, torch.float64), carry=carried_start(torch.float64)) for _ in range(3)]
    members = [ft.with_hyper(member, lr=0.01 * (1 + place)) for place, member in enumerate(members)]
    check_members(step, members, [net_batch(4, place, torch.float64) for place in range(3)])


@pytest.mark.parametrize("how", ["fused", "vmap", "threads", "loop"])
def test_members_compute_in_parts_by_every_plan(how):
    # Threads are looped here: inside vmap they would lose the transform.
    step = ft.step(ft.parallel(ft.grad(keyed_loss), 3, how=how, workers=2), ft.optim.adam(0.05))
    members = [step.init(net_params(seed, torch.float64), seed=seed) for seed in range(2)]
    check_members(step, members, [net_batch(5, place, torch.float64) for place in range(2)])


def test_members_of_a_convolutional_net_have_their_own_dropout():
    params, loss = convolutional()
    step = ft.step(ft.grad(loss), ft.optim.adam(0.01))
    members = [step.init(params, seed=seed) for seed in range(3)]
    together = ft.population(step)
    _, metrics = together(together.init(members), images(6))
    assert len(set(metrics["loss"].tolist())) == 3
    check_members(step, members, [images(6, place) for place in range(2)])


def test_a_compiled_population_is_its_members():
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(ft.optim.cosine(0.1, 9), momentum=0.9))
    members = [ft.with_hyper(step.init(net_params(seed)), lr_peak=0.01 * (seed + 1)) for seed in range(3)]
    check_members(step, members, [net_batch(4, place) for place in range(4)], run=ft.compiled)


def test_a_compiled_population_has_its_members_dropout():
    def loss(params, batch, *, key):
        return (ft.random.dropout(batch, 0.5, key) @ params["w"]).square()

    step = ft.step(ft.grad(loss), ft.optim.sgd(0.1))
    members = [step.init({"w": torch.ones(3)}, seed=seed) for seed in range(2)]
    check_members(step, members, [torch.ones(4, 3)] * 3, run=ft.compiled)


def test_hyperparameters_of_all_members_are_set_at_once():
    step = ft.step(ft.grad(keyed_loss), ft.optim.adam(0.05))
    together = ft.population(step)
    states = together.init([step.init(net_params(seed), seed=seed) for seed in range(3)])
    same = ft.with_hyper(states, lr=0.5)
    assert ft.hyper(same)["lr"].tolist() == [0.5] * 3
    each = ft.with_hyper(states, lr=torch.tensor([0.1, 0.2, 0.3]))
    equal("each", ft.hyper(each)["lr"], torch.tensor([0.1, 0.2, 0.3], dtype=torch.float32).double())
    together(same, net_batch(3))
    with pytest.raises(ft.ArgumentError, match=r"lr has shape \(3,\)"):
        ft.with_hyper(states, lr=torch.zeros(2))


def test_members_have_to_fit_together():
    step = ft.step(ft.grad(keyed_loss), ft.optim.sgd(0.1))
    other = ft.step(ft.grad(keyed_loss), ft.optim.adam(0.1))
    start = step.init(net_params())
    wide = step.init(net_params() | {"scale": torch.ones(2)})
    together = ft.population(step)
    for members in ([start, other.init(net_params())], [start, wide], [start, step.init({"w": torch.ones(2)})]):
        with pytest.raises(ft.TreeError, match="structure, shapes and dtypes"):
            together.init(members)
    with pytest.raises(ft.TreeError, match="same position"):
        together.init([start, step(start, net_batch(2))[0]])
    with pytest.raises(ft.ArgumentError, match="at least one member"):
        together.init([])
    with pytest.raises(ft.ArgumentError, match="donat"):
        ft.population(ft.step(ft.grad(keyed_loss), ft.optim.sgd(0.1), donate=True))
    with pytest.raises(ft.ArgumentError, match="takes a step"):
        ft.population(keyed_loss)
