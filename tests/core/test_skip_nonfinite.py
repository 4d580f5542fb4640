"""Gradients that are not finite are passed over: the run is that of the others alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import keyed_loss, net_batch, net_params
from updating import bowl, run

import functrain as ft
from functrain.core import optim
from functrain.testing import check_optimizer, check_step, equal, same_bits

INNER = optim.adamw(optim.cosine(0.1, 20))


@pytest.mark.parametrize("fused", [False, True])
@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=8),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    leaf=st.integers(0, 4),
)
def test_a_run_is_that_of_the_finite_gradients(fused, bad, value, leaf):
    params = net_params()

    def slope(now, count):
        flat, spec = ft.tree.flatten(bowl(now, count))
        if bad[count]:
            flat[leaf].reshape(-1)[-1] = value
        return ft.tree.unflatten(spec, flat)

    got, state = run(optim.skip_nonfinite(INNER), params, len(bad), slope, fused)
    kept = [count for count, skipped in enumerate(bad) if not skipped]
    alone, inner = run(INNER, params, len(kept), lambda now, count: bowl(now, kept[count]), fused)
    same_bits("params", got[-1], alone[-1] if alone else params)
    same_bits("state", state.inner["optimizer"], inner)
    assert state.skipped.item() == sum(bad)


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_goes_on_and_advances(donate):
    step = ft.step(ft.grad(keyed_loss), optim.skip_nonfinite(INNER), donate=donate)
    state, good = step.init(net_params()), net_batch(3)
    bad = ft.tree.map(lambda leaf: leaf * torch.nan, good)
    state, _ = step(state, good)
    before = ft.tree.map(torch.clone, state)
    state, metrics = step(state, bad)
    assert metrics["loss"].isnan()
    same_bits("params", (state.params, state.opt.inner), (before.params, before.opt.inner))
    assert (state.position.item(), state.opt.skipped.item()) == (2, 1)
    check_step(step, net_params(), [good, bad, good])


def test_members_skip_by_themselves_and_derivatives_stay_finite():
    optimizer = optim.skip_nonfinite(INNER)
    params = torch.tensor([1.0, 2.0], dtype=torch.float64)
    grads = torch.tensor([[1.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]], dtype=torch.float64)

    def after(rate, grads):
        state = ft.with_hyper(optimizer.init(params), lr_peak=rate)
        updates, state = optimizer.update(grads, state, params)
        return updates.sum(), state.skipped

    rate = torch.tensor(0.1, dtype=torch.float64)
    slopes, skipped = torch.func.vmap(torch.func.grad(after, has_aux=True), (None, 0))(rate, grads)
    assert skipped.tolist() == [0, 1, 1]
    # Adam's first step is the rate by the sign; the decay is the rate by 0.01 of the params.
    equal("slopes", slopes, torch.tensor([-2 - 0.03, 0.0, 0.0], dtype=torch.float64), 1e-6)
    by_grads = torch.func.vmap(torch.func.grad(lambda g: after(rate, g)[0]))(grads)
    assert by_grads.isfinite().all()


def test_it_obeys_the_laws_of_optimizers():
    check_optimizer(optim.skip_nonfinite(INNER))
    plain = optim.skip_nonfinite(optim.chain(optim.adam(0.1), optim.clip(0.01)))
    assert plain.fused is None
    check_optimizer(plain, net_params(0, torch.bfloat16), transforms=False)


def test_refusals():
    with pytest.raises(ft.ArgumentError, match="skip_nonfinite: what it is given is no optimizer, got function adamw"):
        optim.skip_nonfinite(optim.adamw)
    optimizer = optim.skip_nonfinite(INNER)
    with pytest.raises(ft.TreeError, match="expected the SkipState"):
        optimizer.update(net_params(), INNER.init(net_params()), net_params())
