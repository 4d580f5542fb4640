"""What losses, gradients, optimizers and steps refuse, and that the message says what to do."""

from __future__ import annotations

import pytest
import torch
from instances import carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params
from torch import nn

import functrain as ft

PARAMS, BATCH = {"w": torch.ones(2)}, torch.ones(4, 2)


def linear(params, batch):
    return batch @ params["w"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(3, 2), "y": torch.ones(4)}, r"same first dimension N; got x: \(3, 2\), y: \(4,\)"),
        (torch.ones(0, 2), r"the batch is empty \(N = 0\)"),
        (torch.tensor(1.0), "same first dimension N"),
        ({}, "no leaves"),
    ],
)
def test_batches_that_are_none(batch, message):
    for grad in (ft.grad(linear), ft.parallel(ft.grad(linear), 2), ft.parallel(ft.grad(linear), 2, how="loop")):
        with pytest.raises(ft.TreeError, match=message):
            grad(PARAMS, batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, b: linear(p, b).mean(), r"0-d tensor \(a mean or a sum\).*reduction='none'"),
        (lambda p, b: (linear(p, b).mean(), b[:, 0]), "0-d tensor"),
        (lambda p, b: linear(p, b).mean().item(), "tensor of per-example losses, got float"),
        (lambda p, b: (linear(p, b), b[:, 0], b), "got a tuple of 3"),
        (lambda p, b: None, "got NoneType"),
        (lambda p, b: linear(p, b) > 0, "must be floating, got torch.bool"),
        (lambda p, b: linear(p, b)[:0], r"no losses \(shape \(0,\)\)"),
        (lambda p, b: (linear(p, b), torch.ones(3)), r"weights have shape \(3,\), losses \(4,\)"),
        (lambda p, b: (linear(p, b), 1.0), "weights must be a tensor, got float"),
        (lambda p, b: ft.Losses(linear(p, b), aux={"m": b}), r"aux measures are per example.*\(4,\), got \(4, 2\)"),
    ],
)
def test_losses_that_break_their_contract(loss, message):
    for grad in (ft.grad(loss), ft.parallel(ft.grad(loss), 1, how="threads")):
        with pytest.raises(ft.LossError, match=message):
            grad(PARAMS, BATCH)
    with pytest.raises(ft.LossError, match=message):
        torch.func.grad(lambda params: ft.grad(loss)(params, BATCH).loss)(PARAMS)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, b, *, carry: linear(p, b), r"returns \(losses, carry\), got Tensor of shape \(4,\)"),
        (lambda p, b, *, carry: (linear(p, b), None), "has to return it"),
        (lambda p, b, *, carry: ft.Losses(linear(p, b)), "has to return it"),
        (lambda p, b, *, carry: (linear(p, b), carry, 1), "got a tuple of 3"),
    ],
)
def test_carries_that_are_not_returned(loss, message):
    with pytest.raises(ft.LossError, match=message):
        ft.grad(loss)(PARAMS, BATCH, carry={"n": torch.zeros(1)})


def test_what_a_loss_declares_has_to_be_given():
    params, batch = net_params(), net_batch(3)
    for grad in (ft.grad(carried_loss), ft.parallel(ft.grad(carried_loss), 2, how="loop")):
        with pytest.raises(ft.LossError, match=r"declares `carry`, and none was given.*step.init\(params, carry="):
            grad(params, batch)
    for grad in (ft.grad(keyed_loss), ft.parallel(ft.grad(keyed_loss), 2), ft.parallel(ft.grad(keyed_loss), 2, how="loop")):
        with pytest.raises(ft.LossError, match=r"declares `key`, and none was given: pass key="):
            grad(params, batch)
    with pytest.raises(ft.LossError, match="does not declare it: write loss"):
        ft.grad(net_loss)(params, batch, carry=carried_start())
    step = ft.step(ft.grad(carried_loss), ft.optim.sgd(0.1))
    with pytest.raises(ft.LossError, match=r"step.init\(params, carry="):
        step(step.init(params), batch)
    with pytest.raises(ft.LossError, match="declares `carry`, and none was given"):
        ft.evaluate(carried_loss, params, [batch])


def test_batch_norm_in_training_without_a_carry():
    params, apply = ft.functional(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(ft.LossError, match=r"updates its buffers when training.*carry=apply.buffers\); or use apply.eval\(\)"):
        ft.grad(lambda p, b: apply(p, b).sum(1))(params, BATCH)
    assert ft.grad(lambda p, b: apply.eval()(p, b).sum(1))(params, BATCH).weight == 4


@pytest.mark.parametrize("write", ["mul_", "no_grad"])
def test_a_loss_that_changes_its_params(write):
    def loss(params, batch):
        if write == "mul_":
            params["w"].mul_(2)
        else:
            with torch.no_grad():
                params["w"].mul_(2)
        return linear(params, batch)

    with pytest.raises((ft.LossError, RuntimeError), match=r"in place|in-place"):
        ft.grad(loss)({"w": torch.ones(2)}, BATCH)


def test_params_that_have_no_gradient():
    for params in ({"w": torch.ones(2), "n": torch.tensor(1)}, {"w": torch.ones(2), "n": 1.0}):
        with pytest.raises(ft.TreeError, match=r"floating params; 'n' is (torch.int64|float): keep such tensors in the carry"):
            ft.grad(linear)(params, BATCH)
    with pytest.raises(ft.TreeError, match="a leaf of type float"):
        ft.step(ft.grad(linear), ft.optim.sgd(0.1)).init({"w": 1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ft.optim.sgd(-0.1), r"lr must be a number of at least 0 or a schedule, got -0.1"),
        (lambda: ft.optim.sgd(float("nan")), "lr must be a number"),
        (lambda: ft.optim.sgd("fast"), "lr must be a number.*'fast'"),
        (lambda: ft.optim.sgd(0.1, momentum=-1), "momentum must be a number"),
        (lambda: ft.optim.sgd(0.1, nesterov=True), "nesterov needs momentum above 0"),
        (lambda: ft.optim.sgd(0.1, momentum=0.9, dampening=0.1, nesterov=True), "no dampening"),
        (lambda: ft.optim.adam(-1), "lr must be a number"),
        (lambda: ft.optim.adam(b1=1.0), r"b1 must be a number in \[0, 1\).*1.0"),
        (lambda: ft.optim.adamw(b2=-0.1), r"b2 must be a number in \[0, 1\)"),
        (lambda: ft.optim.adamw(eps=-1e-8), "eps must be a number"),
        (lambda: ft.optim.adamw(weight_decay=-1), "weight_decay must be a number"),
        (lambda: ft.optim.cosine(0.1, 0), "steps must be an int of at least 1, got 0"),
        (lambda: ft.optim.warmup(0, 0.1), "steps must be an int of at least 1, got 0"),
        (lambda: ft.optim.warmup(2.5, 0.1), "steps must be an int of at least 1, got 2.5"),
        (lambda: ft.optim.warmup(2, ft.optim.warmup(3, 0.1)), "warms up already"),
        (lambda: ft.optim.adam(ft.optim.cosine(-0.1, 10)), "lr is on the schedule cosine.*is -0.1 at count 0"),
        (lambda: ft.optim.adam(ft.optim.cosine(float("nan"), 10)), "peak must be a finite number, got nan"),
        (lambda: ft.optim.adam(b1=ft.optim.constant(1.5)), r"b1 is on the schedule.*\[0, 1\)"),
        (lambda: ft.optim.piecewise(0.1, {-1: 0.5}), r"counts of updates.*\[-1\]"),
        (lambda: ft.optim.piecewise(0.1, {1.5: 0.5}), r"counts of updates.*\[1.5\]"),
    ],
)
def test_numbers_that_optimizers_refuse(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_hyperparameters_that_are_not_there():
    state = ft.optim.sgd(ft.optim.cosine(0.1, 5), momentum=0.9).init(PARAMS)
    message = r"no hyperparameter 'lr': expected one of 'lr_peak', 'lr_steps', 'lr_end', 'momentum'"
    with pytest.raises(ft.ArgumentError, match=message):
        ft.with_hyper(state, lr=0.1)
    with pytest.raises(ft.ArgumentError, match="has no hyperparameters"):
        ft.with_hyper(PARAMS, lr=0.1)
    with pytest.raises(ft.TreeError, match="grads do not have the structure of params: missing 'w'; unexpected 'v'"):
        ft.optim.sgd(0.1).update({"v": torch.ones(2)}, ft.optim.sgd(0.1).init(PARAMS), PARAMS)


def test_parts_that_do_not_fit_together():
    with pytest.raises(ft.LossError, match=r"function of \(params, batch\), got Linear|got str"):
        ft.grad("loss")
    with pytest.raises(ft.ArgumentError, match=r"expected a gradient, got function .*linear: write ft.grad\(loss\)"):
        ft.step(linear, ft.optim.sgd(0.1))
    with pytest.raises(ft.ArgumentError, match=r"expected an optimizer, got float"):
        ft.step(ft.grad(linear), 0.1)
    step = ft.step(ft.grad(linear), ft.optim.sgd(0.1))
    with pytest.raises(ft.ArgumentError, match=r"expected a state as step.init\(params\) makes it, got dict"):
        step(PARAMS, BATCH)
    for seed in ("0", 0.5, True, None):
        with pytest.raises(ft.ArgumentError, match="a seed must be an int"):
            step.init(PARAMS, seed=seed)


def test_time_that_is_not_there():
    loss = ft.seqloss(lambda p, now, *, carry: (now @ p["w"], carry))
    with pytest.raises(ft.LossError, match="declare one"):
        ft.tbptt(ft.grad(linear), 2, lambda b: torch.zeros(len(b)))
    with pytest.raises(ft.LossError, match="needs the carry that a sequence starts with"):
        ft.tbptt(ft.grad(loss), 2)(PARAMS, torch.ones(3, 4, 2))
    with pytest.raises(ft.TreeError, match="start has N = 2, the batch N = 3"):
        ft.tbptt(ft.grad(loss), 2, torch.zeros(2))(PARAMS, torch.ones(3, 4, 2))
    with pytest.raises(ft.TreeError, match=r"leaves \(N, T, …\) with one T"):
        ft.windows({"x": torch.ones(2, 3), "y": torch.ones(2, 4)}, 2)
    with pytest.raises(ft.TreeError, match=r"T = 0"):
        ft.windows(torch.ones(2, 0), 2)
    for window in (0, -1, 1.5, True):
        with pytest.raises(ft.ArgumentError, match="at least 1 time step"):
            ft.windows(torch.ones(2, 3), window)
