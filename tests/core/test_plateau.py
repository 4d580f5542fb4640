"""On a plateau the scale follows torch's ReduceLROnPlateau, option by option."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import net_batch, net_loss, net_params
from updating import run

import functrain as ft
from functrain.core import optim
from functrain.testing import check_optimizer, check_step, equal, same_bits

OPTIONS = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
        "patience": st.integers(0, 3),
        "mode": st.sampled_from(["min", "max"]),
        "threshold": st.sampled_from([0.0, 1e-4, 0.3]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3),
        "eps": st.sampled_from([0.0, 1e-8, 0.2]),
    }
)
LOSSES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.7, 1.0, 1.0001, 2.0, 3.0, math.nan, math.inf]), min_size=1, max_size=24)


def torchs_scales(losses, least, options):
    """The rate of each step, of a rate that starts at 1."""
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(other, min_lr=least, **options)
    scales = []
    for loss in losses:
        scales.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step(loss)
    return scales


def ones(params, count):
    return ft.tree.map(torch.ones_like, params)


@pytest.mark.parametrize("fused", [False, True])
@given(losses=LOSSES, least=st.sampled_from([0.0, 0.05, 0.6]), options=OPTIONS)
def test_the_scale_is_torchs_rate(fused, losses, least, options):
    optimizer = optim.plateau(optim.sgd(1.0), min_scale=least, **options)
    start = torch.zeros(2, dtype=torch.float64)
    extra = [{"loss": torch.tensor(loss, dtype=torch.float64)} for loss in losses]
    places, _ = run(optimizer, start, len(losses), ones, fused, extra.__getitem__)
    moved = -torch.stack([start, *places]).diff(dim=0)[:, 0]
    equal("scales", moved, torch.tensor(torchs_scales(losses, least, options), dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("every", [2, 5])
def test_a_look_is_at_the_mean_of_every_updates(every):
    losses = ft.random.uniform(ft.random.key(0), (60,), torch.float64)
    optimizer = optim.plateau(optim.sgd(1.0), 0.5, 1, every=every)
    params = torch.zeros(())
    state, scales = optimizer.init(params), []
    for loss in losses:
        scales.append(state.scale.item())
        _, state = optimizer.update(torch.ones(()), state, params, loss=loss)
    expected = torchs_scales(losses.reshape(-1, every).mean(1).tolist(), 0.0, {"factor": 0.5, "patience": 1})
    assert scales == [scale for scale in expected for _ in range(every)]
    assert scales[-1] < 0.2


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_hands_in_its_loss_and_shows_the_scale(donate):
    # At this rate the loss grows from the first step on.
    step = ft.step(ft.grad(net_loss), optim.plateau(optim.sgd(0.7), 0.5, 0), donate=donate)
    state, rows = step.init(net_params(0, torch.float64)), []
    for _ in range(12):
        state, metrics = step(state, net_batch(8, 0, torch.float64))
        rows.append((metrics["loss"].item(), metrics["scale"].item()))
    losses, scales = zip(*rows)
    assert [1.0, *scales] == torchs_scales([*losses, 0.0], 0.0, {"factor": 0.5, "patience": 0})
    assert scales[-1] < 1
    check_step(step, net_params(), [net_batch(3, place) for place in range(4)])


def test_members_fall_by_themselves():
    optimizer = optim.plateau(optim.sgd(1.0), 0.5, 1)
    params, sequences = torch.zeros(()), torch.tensor([[3.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.5, 0.5]])

    def scale(losses):
        state = optimizer.init(params)
        for loss in losses.unbind():
            _, state = optimizer.update(torch.ones(()), state, params, loss=loss)
        return state.scale

    assert torch.func.vmap(scale)(sequences).tolist() == [1.0, 0.5, 0.5]


def test_the_scale_keeps_no_graph_of_the_losses():
    optimizer, params = optim.plateau(optim.sgd(1.0)), torch.zeros(())
    loss = torch.tensor(1.0, requires_grad=True) * 2
    _, state = optimizer.update(torch.ones(()), optimizer.init(params), params, loss=loss)
    assert not any(leaf.requires_grad for leaf in ft.tree.leaves(state))


def test_a_fused_update_of_scale_one_has_the_optimizers_bits():
    params = net_params()
    inner = optim.adamw(0.1)
    got, _ = run(optim.plateau(inner), params, 3, fused=True, extra=lambda count: {"loss": torch.tensor(1.0)})
    same_bits("params", got, run(inner, params, 3, fused=True)[0])


def test_it_obeys_the_laws_of_optimizers():
    optimizer = optim.plateau(optim.adamw(0.1), 0.5, 0, mode="max", every=2)
    check_optimizer(optimizer)
    check_optimizer(optimizer, net_params(0, torch.bfloat16), transforms=False)


def test_refusals():
    rows = [
        ({"factor": 1.0}, r"factor must be a number in \[0, 1\)"),
        ({"patience": -1}, "patience must be a whole number of at least 0"),
        ({"patience": 1.5}, "patience must be a whole number"),
        ({"cooldown": -1}, "cooldown must be a whole number"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"threshold": -0.1}, "threshold must be a number of at least 0"),
        ({"min_scale": -0.1}, "min_scale must be a number"),
        ({"eps": math.nan}, "eps must be a number"),
        ({"mode": "lowest"}, "mode is 'min' or 'max'"),
        ({"threshold_mode": "relative"}, "threshold_mode 'rel' or 'abs'"),
    ]
    for options, message in rows:
        with pytest.raises(ft.ArgumentError, match=message):
            optim.plateau(optim.sgd(0.1), **options)
    with pytest.raises(ft.ArgumentError, match="what it is given is no optimizer, got float"):
        optim.plateau(0.1)
