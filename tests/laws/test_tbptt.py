"""Law 7: a window as long as the sequence is full backpropagation; carry crosses windows, gradient does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import random_tree, recurrent

import functrain as ft
from functrain.testing import equal

SIZES = {"x": (2, 6, 3), "y": (2, 6, 2)}


def cell_loss(params, now, *, carry):
    hidden = torch.tanh(now["x"] @ params["in"] + carry @ params["rec"])
    return (hidden @ params["out"] - now["y"]).square().sum(-1), hidden


def cell_params(seed=0):
    return random_tree({"in": (3, 4), "rec": (4, 4), "out": (4, 2)}, seed, torch.float64)


def sequences(size=2, time=6, seed=0):
    return random_tree({"x": (size, time, 3), "y": (size, time, 2)}, seed, torch.float64)


def zeros(batch):
    return batch["x"].new_zeros(len(batch["x"]), 4)


def by_hand(params, batch, window):
    """Σ over windows of the gradient by torch's own autograd, with the state detached between windows."""
    leaves, spec = ft.tree.flatten(ft.tree.map(lambda leaf: leaf.clone().requires_grad_(), params))
    carry, total = zeros(batch), 0
    for time in range(batch["x"].shape[1]):
        carry = carry.detach() if time % window == 0 else carry
        losses, carry = cell_loss(
            ft.tree.unflatten(spec, leaves), {name: leaf[:, time] for name, leaf in batch.items()}, carry=carry
        )
        total = total + losses.sum()
    return total.detach(), ft.tree.unflatten(spec, list(torch.autograd.grad(total, leaves)))


@given(window=st.integers(1, 9), time=st.integers(1, 8), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_windows_are_truncated_backpropagation(window, time, size, seed):
    params, batch = cell_params(seed), sequences(size, time, seed)
    taken = ft.tbptt(ft.grad(ft.seqloss(cell_loss)), window, zeros)(params, batch)
    equal("by hand", (taken.loss, taken.grads), by_hand(params, batch, window))
    assert taken.weight == size * time


def test_a_window_as_long_as_the_sequence_is_full_backpropagation():
    params, batch = cell_params(), sequences()
    loss = ft.seqloss(cell_loss)
    whole = ft.grad(loss)(params, batch, carry=zeros(batch))
    for window in (6, 7, 100):
        taken = ft.tbptt(ft.grad(loss), window, zeros)(params, batch)
        equal("full", (taken.grads, taken.loss), (whole.grads, whole.loss))
    shorter = ft.tbptt(ft.grad(loss), 3, zeros)(params, batch)
    equal("the values are those of the whole", shorter.loss, whole.loss)
    assert not torch.allclose(shorter.grads["rec"], whole.grads["rec"])


def test_the_values_cross_windows_and_the_gradient_does_not():
    # `early` is added to the state at the first time step alone, and only the last three steps count.
    batch = sequences() | {"first": (torch.arange(6) == 0).double().expand(2, 6)}
    batch["counts"] = (torch.arange(6) >= 3).double().expand(2, 6)
    params = cell_params() | {"early": torch.ones(4, dtype=torch.float64)}

    def loss(params, now, *, carry):
        losses, carry = cell_loss(params, now, carry=carry)
        return (losses, now["counts"]), carry + now["first"][:, None] * params["early"]

    def taken(window, params=params):
        return ft.tbptt(ft.grad(ft.seqloss(loss)), window, zeros)(params, batch)

    assert taken(6).grads["early"].abs().sum() > 1e-3
    assert taken(3).grads["early"].abs().sum() == 0
    moved = taken(3, params | {"early": 2 * params["early"]})
    assert not torch.allclose(taken(3).loss, moved.loss, rtol=1e-6)


@settings(max_examples=8)
@given(window=st.integers(1, 6), parts=st.integers(1, 3), how=st.sampled_from(["loop", "threads", "fused", "vmap"]))
def test_lanes_in_parallel_are_plain_tbptt(window, parts, how):
    params, batch = cell_params(), sequences(5)
    plain = ft.tbptt(ft.grad(ft.seqloss(cell_loss)), window, zeros)
    equal(how, ft.parallel(plain, parts, how=how, workers=2).finished(params, batch), plain.finished(params, batch))


def test_lstm_windows_follow_its_own_autograd():
    params, loss, start = recurrent()
    batch = random_tree(SIZES, 1)
    taken = ft.tbptt(ft.grad(loss), 3, start)(params, batch)
    halves = ft.windows(batch, 3)
    first = ft.grad(loss)(params, halves[0], carry=start(batch))
    second = ft.grad(loss)(params, halves[1], carry=first.carry)
    equal("grads", taken.grads, ft.reduce.add(first.grads, second.grads))


def test_a_step_over_windows_is_the_steps_one_after_another():
    params, batch = cell_params(), sequences(3, 7)
    inner = ft.step(ft.grad(ft.seqloss(cell_loss)), ft.optim.adam(ft.optim.cosine(0.1, 10)))
    over = ft.tbptt(inner, 3, zeros)
    state, metrics = over(over.init(params), batch)
    alone, losses = inner.init(params, carry=zeros(batch)), []
    for part in ft.windows(batch, 3):
        alone, measured = inner(alone, part)
        losses.append((measured["loss"], measured["weight"]))
    equal("params", state.params, alone.params)
    equal("opt", state.opt, alone.opt)
    assert state.position == 1
    assert state.carry is None
    equal("loss", metrics["loss"], sum(loss * weight for loss, weight in losses) / 21)
    assert metrics["weight"] == 21


@given(time=st.integers(1, 9), size=st.integers(1, 10))
def test_windows_cover_the_sequence_in_order(time, size):
    batch = sequences(2, time)
    parts = ft.windows(batch, size)
    equal("joined", ft.tree.map(lambda *rows: torch.cat(rows, 1), *parts), batch)
    assert [part["x"].shape[1] for part in parts[:-1]] == [size] * (len(parts) - 1)


@pytest.mark.parametrize("declares", [True, False])
def test_seqloss_is_the_loss_at_each_time(declares):
    params, batch = cell_params(), sequences(2, 4)

    def plain(params, now):
        return (now["x"] @ params["in"] @ params["out"] - now["y"]).square().sum(-1), now["x"][:, 0].abs()

    if not declares:
        rows = [plain(params, {name: leaf[:, time] for name, leaf in batch.items()}) for time in range(4)]
        got = ft.seqloss(plain)(params, batch)
        equal("losses", (got.losses, got.weights), tuple(torch.stack(column, 1) for column in zip(*rows)))
        return
    carry = zeros(batch)
    got = ft.seqloss(cell_loss)(params, batch, carry=carry)
    for time in range(4):
        losses, carry = cell_loss(params, {name: leaf[:, time] for name, leaf in batch.items()}, carry=carry)
        equal("losses", got.losses[:, time], losses)
    equal("carry", got.carry, carry)
