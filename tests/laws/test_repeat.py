"""Law 12: repeat(step, n) is n steps; accumulate over n micro-batches is one batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import OPTIMIZERS, keyed_loss, net_batch, net_loss, net_params

import functrain as ft
from functrain.testing import equal, same_bits


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_repeat_is_steps(name, donate):
    step = ft.step(ft.grad(keyed_loss), OPTIMIZERS[name](ft.optim.cosine(0.05, 9)), donate=donate)
    for count in (1, 2, 5):
        batches = [net_batch(3, place) for place in range(count)]
        state, rows = step.init(net_params(), seed=2), []
        for batch in batches:
            state, metrics = step(state, batch)
            rows.append(metrics)
        repeated = ft.repeat(step, count)
        assert repeated.donates == donate
        got = repeated(repeated.init(net_params(), seed=2), ft.tree.stack(batches))
        same_bits(f"{count} steps", got, (state, ft.tree.stack(rows)))


def test_repeat_refuses_other_stacks():
    repeated = ft.repeat(ft.step(ft.grad(net_loss), ft.optim.sgd(0.1)), 3)
    with pytest.raises(ft.ArgumentError, match="3 batches stacked, got 2"):
        repeated(repeated.init(net_params()), ft.tree.stack([net_batch(2), net_batch(2)]))
    for steps in (0, -1, True, 1.0):
        with pytest.raises(ft.ArgumentError, match="at least 1"):
            ft.repeat(repeated, steps)


@given(size=st.integers(1, 12), parts=st.integers(1, 8), seed=st.integers(0, 99))
def test_accumulate_is_one_batch(size, parts, seed):
    params, batch = net_params(seed, torch.float64), net_batch(size, seed, torch.float64)
    whole = ft.grad(keyed_loss)
    key = ft.random.key(seed)
    got = ft.accumulate(whole, parts)
    equal("finished", got.finished(params, batch, key=key), whole.finished(params, batch, key=key))
    step, other = (ft.step(grad, ft.optim.adamw(0.01)) for grad in (got, whole))
    equal("a step", step(step.init(params, seed=1), batch), other(other.init(params, seed=1), batch))


def test_accumulate_sees_one_micro_batch_at_a_time():
    sizes = []

    def loss(params, batch):
        sizes.append(len(batch["x"]))
        return net_loss(params, batch)

    ft.accumulate(ft.grad(loss), 3)(net_params(), net_batch(8))
    assert sizes == [3, 3, 2]
