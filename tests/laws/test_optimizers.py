"""Law 11: optimizers follow torch.optim's over 100 steps, and schedules torch's schedulers; all obey check_optimizer."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import OPTIMIZERS, RATES, SCHEDULES, net_batch, net_loss, net_params

import functrain as ft
from functrain.core.optim import apply_updates, cosine, with_hyper
from functrain.testing import LawError, check_optimizer, equal

DTYPES = [torch.float64, torch.float32]
TORCH = {
    "sgd": (torch.optim.SGD, {}),
    "sgd decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {}),
    "adam decay": (torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
}


@pytest.mark.parametrize(("name", "rate"), list(itertools.product(OPTIMIZERS, RATES)))
def test_every_optimizer_obeys_its_laws(name, rate):
    check_optimizer(OPTIMIZERS[name](RATES[rate](0.05)))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_optimizer_keeps_the_dtype_of_params(name, dtype):
    params = net_params(0, torch.float64)
    check_optimizer(OPTIMIZERS[name](0.01), ft.tree.map(lambda leaf: leaf.to(dtype), params))


@settings(max_examples=10)
@given(
    lr=st.floats(1e-4, 1.0),
    b1=st.floats(0, 0.99),
    b2=st.floats(0.5, 0.9999),
    eps=st.floats(1e-10, 1e-2),
    decay=st.floats(0, 0.5),
)
def test_adam_and_adamw_with_any_numbers(lr, b1, b2, eps, decay):
    for optimizer in (ft.optim.adam, ft.optim.adamw):
        check_optimizer(optimizer(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay), net_params(0, torch.float64), steps=3)


def follow(params, optimizer, torch_optimizer, scheduler=None, fused=False, steps=100):
    """Both optimizers from the same params, over the same gradients of a quadratic bowl with noise."""
    theirs = [leaf.clone() for leaf in ft.tree.leaves(params)]
    other = torch_optimizer(theirs)
    rates = scheduler(other) if scheduler else None
    mine, state = ft.tree.map(torch.clone, params), optimizer.init(params)
    flat, spec = ft.tree.flatten(params)
    for count in range(steps):
        noise = [ft.random.normal(ft.random.key(1000 * count + n), p.shape, p.dtype) for n, p in enumerate(flat)]
        for leaf, shift in zip(theirs, noise):
            leaf.grad = leaf.detach() + shift
        other.step()
        if rates is not None:
            rates.step()
        grads = ft.tree.map(torch.add, mine, ft.tree.unflatten(spec, noise))
        if fused:
            mine, state = optimizer.fused(grads, state, mine)
        else:
            updates, state = optimizer.update(grads, state, mine)
            mine = apply_updates(mine, updates)
    return mine, ft.tree.unflatten(spec, [leaf.detach() for leaf in theirs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_a_hundred_steps_follow_torch(name, dtype):
    kind, options = TORCH[name]
    optimizer = OPTIMIZERS[name](0.01)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for fused in (False, True) if optimizer.fused else (False,):
        got, expected = follow(net_params(2, dtype), optimizer, lambda leaves: kind(leaves, lr=0.01, **options), fused=fused)
        equal(f"{name}, fused={fused}", got, expected, tolerance)


@pytest.mark.parametrize("name", ["sgd nesterov", "adamw"])
def test_cosine_follows_torchs_cosine(name):
    kind, options = TORCH[name]
    got, expected = follow(
        net_params(3, torch.float64),
        OPTIMIZERS[name](cosine(0.02, 60, end=0.001)),
        lambda leaves: kind(leaves, lr=0.02, **options),
        lambda other: torch.optim.lr_scheduler.CosineAnnealingLR(other, 60, eta_min=0.001),
        steps=60,
    )
    equal(name, got, expected, 1e-9)


def test_schedules_are_what_they_say():
    counts = torch.arange(40)
    torchs = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    multistep = torch.optim.lr_scheduler.MultiStepLR(torchs, [3, 7], gamma=0.5)
    rates = []
    for _ in counts:
        rates.append(multistep.get_last_lr()[0])
        torchs.step()
        multistep.step()
    equal("piecewise", ft.optim.piecewise(1.0, {3: 0.5, 7: 0.5})(counts), torch.tensor(rates, dtype=torch.float64))
    for name, schedule in SCHEDULES.items():
        values = schedule(0.5)(counts)
        assert values.shape == counts.shape, name
        assert values.dtype == torch.float64, name
        assert ((values > -1e-12) & (values <= 0.5)).all(), name
        equal(name, torch.stack([schedule(0.5)(count) for count in counts]), values)
    assert ft.optim.warmup(4, 1.0)(4) == 1.0
    assert ft.optim.warmup(4, cosine(1.0, 10))(4) == 1.0
    assert math.isclose(ft.optim.warmup(4, cosine(1.0, 10))(14), 0.0, abs_tol=1e-12)


@pytest.mark.parametrize("rate", SCHEDULES)
def test_a_scheduled_step_uses_and_reports_the_rate_of_its_count(rate):
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(SCHEDULES[rate](0.1)))
    state = step.init(net_params(0, torch.float64))
    for count in range(9):
        batch = net_batch(5, count, torch.float64)
        grads = ft.grad(net_loss).finished(state.params, batch).grads
        new, metrics = step(state, batch)
        expected = SCHEDULES[rate](0.1)(count)
        equal("reported", metrics["lr"], expected)
        equal("used", new.params, ft.tree.map(lambda p, g, r=expected: p - r * g, state.params, grads))
        state = new


def test_other_numbers_of_a_schedule_are_another_schedule():
    params, grads = net_params(0), net_params(1)
    state = with_hyper(ft.optim.sgd(cosine(0.1, 10)).init(params), lr_peak=0.5)
    updates, _ = ft.optim.sgd(cosine(0.1, 10)).update(grads, state, params)
    expected, _ = ft.optim.sgd(cosine(0.5, 10)).update(grads, ft.optim.sgd(cosine(0.5, 10)).init(params), params)
    equal("peak", updates, expected)


@pytest.mark.parametrize("transform", ["transposed", "expanded", "sliced"])
def test_the_fused_kernel_reads_gradients_of_any_layout(transform):
    # The kernel walks memory: these gradients have other strides than their params.
    losses = {
        "transposed": lambda p, b: (p["w"].t() * b.reshape(-1, 4, 3)).sum((1, 2)),
        "expanded": lambda p, b: p["w"].sum() * b[:, 0],
        "sliced": lambda p, b: torch.stack([p["w"], 2 * p["w"]], -1)[..., 0].square().sum() * b[:, 0],
    }
    batch, params = net_params(0)["hidden"]["w"].new_ones(2, 12).cumsum(1), {"w": net_params(0)["hidden"]["w"]}
    grad, optimizer = ft.grad(losses[transform]), ft.optim.adam(0.1)
    state = optimizer.init(params)
    updates, _ = optimizer.update(grad.finished(params, batch).grads, state, params)
    stepped, _ = ft.step(grad, optimizer)(ft.step(grad, optimizer).init(params), batch)
    equal(transform, stepped.params, apply_updates(params, updates))


def test_a_rate_can_be_learned():
    params, batch = net_params(0, torch.float64), net_batch(5, 0, torch.float64)
    step = ft.step(ft.grad(net_loss), ft.optim.adam(0.1))

    def after(lr):
        state, _ = step(with_hyper(step.init(params), lr=lr), batch)
        return ft.grad(net_loss).finished(state.params, batch).loss

    lr = torch.tensor(0.1, dtype=torch.float64)
    slope = (after(lr + 1e-6) - after(lr - 1e-6)) / 2e-6
    equal("by differences", torch.func.grad(after)(lr), slope, 1e-5)
    tracked = lr.clone().requires_grad_()
    after(tracked).backward()
    equal("by autograd", tracked.grad, slope, 1e-5)


def in_place(optimizer):
    return dataclasses.replace(optimizer, update=lambda g, s, p: (ft.tree.map(lambda leaf: leaf.mul_(-1), g), s))


def other_fused(optimizer):
    return dataclasses.replace(optimizer, fused=lambda g, s, p: (ft.tree.map(torch.add, p, g), s))


def test_the_checker_finds_broken_optimizers():
    with pytest.raises(LawError, match="update changes nothing"):
        check_optimizer(in_place(ft.optim.sgd(0.1)))
    with pytest.raises(LawError, match="fused is update and apply"):
        check_optimizer(other_fused(ft.optim.sgd(0.1)))
