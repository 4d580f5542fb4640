"""Law 11: every optimizer obeys check_optimizer (core/test_torch_optimizers.py: and follows torch's, where it has one)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import OPTIMIZERS, RATES, SCHEDULES, net_batch, net_loss, net_params

import functrain as ft
from functrain.core.optim import apply_updates, cosine, with_hyper
from functrain.testing import LawError, check_optimizer, equal


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_obeys_its_laws(name):
    check_optimizer(OPTIMIZERS[name](0.05))


@pytest.mark.parametrize("rate", RATES)
def test_an_optimizer_on_every_schedule_obeys_its_laws(rate):
    check_optimizer(ft.optim.adamw(RATES[rate](0.05)))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_optimizer_keeps_the_dtype_of_params(name, dtype):
    params = net_params(0, torch.float64)
    check_optimizer(OPTIMIZERS[name](0.01), ft.tree.map(lambda leaf: leaf.to(dtype), params), differentiable=False)


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
        check_optimizer(
            optimizer(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay), net_params(0, torch.float64), steps=3, transforms=False
        )


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
