"""Averages of params: against torch's and NumPy's, in every combinator, and what is refused."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import net_batch, net_loss, net_params, random_tree, recurrent
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from wrapped_steps import check_members, check_resumes, net_batches, run

import functrain as ft
from functrain.testing import equal, same_bits


def made(decay=0.9, grad=None, **options):
    return ft.averaged(ft.step(grad or ft.grad(net_loss), ft.optim.adam(0.05)), decay, **options)


def normalised():
    """A module with batch norm in float64, its params and a loss that threads its statistics."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    params, apply = ft.functional(module)

    def loss(params, batch, *, carry):
        scores, carry = apply(params, batch["x"], carry=carry)
        return (scores - batch["targets"][0]).square().sum(1), carry

    return module, params, apply, loss


def held(decay):
    """The decay of an average without correction: its first value is taken whole."""
    return ft.optim.Schedule("held", lambda count, v: torch.where(count == 0, 0.0, v["decay"]), {"decay": decay})


@pytest.mark.parametrize("kind", ["moving", "uniform"])
@pytest.mark.parametrize("carry", [False, True])
def test_it_follows_torch(kind, carry):
    module, params, apply, loss = normalised()
    if kind == "moving":
        theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=carry)
        step = made(held(0.95), ft.grad(loss), carry=carry)
    else:
        theirs = AveragedModel(module, use_buffers=carry)
        step = made(None, ft.grad(loss), start=20, every=3, carry=carry)
    state = step.init(params, carry=apply.buffers)
    for place, batch in enumerate(net_batches(50, dtype=torch.float64)):
        state, _ = step(state, batch)
        if kind == "moving" or (place + 1 >= 20 and (place + 1 - 20) % 3 == 0):
            module.load_state_dict({**state.params, **state.carry})
            theirs.update_parameters(module)
    expected = theirs.module.state_dict()
    equal("params", ft.average(state), {name: expected[name] for name in state.params}, 1e-9)
    if carry:
        statistics = [name for name in state.carry if "running" in name]
        found = ft.average(state, "carry")
        equal("carry", {name: found[name] for name in statistics}, {name: expected[name] for name in statistics}, 1e-9)
        assert found["1.num_batches_tracked"] == state.carry["1.num_batches_tracked"] == 50


@given(
    decay=st.none() | st.floats(0.0, 0.999),
    start=st.integers(0, 6),
    every=st.integers(1, 4),
    steps=st.integers(1, 12),
)
def test_it_is_the_weighted_mean_of_what_it_averages(decay, start, every, steps):
    step = made(decay, start=start, every=every)
    rows = run(step, step.init(net_params(0, torch.float64)), net_batches(steps, dtype=torch.float64))
    state = rows[-1][0]
    seen = [ft.tree.ravel(row.params)[0].numpy() for row, _ in rows]
    taken = [seen[place - 1] for place in range(max(1, start), steps + 1) if (place - start) % every == 0]
    weights = None if decay is None else numpy.power(decay, numpy.arange(len(taken))[::-1])
    # Before the first, it is the params themselves.
    expected = numpy.average(taken, axis=0, weights=weights) if taken else seen[-1]
    equal("average", ft.tree.ravel(ft.average(state))[0], torch.from_numpy(expected), 1e-12)
    assert state.opt.taken == len(taken)


def test_early_averages_are_not_where_the_run_began():
    step = ft.averaged(ft.step(ft.grad(lambda p, batch: batch * p), ft.optim.sgd(1.0)), 0.999)
    state = run(step, step.init(torch.tensor(0.0)), [torch.ones(1)] * 10)[-1][0]
    assert -6 < ft.average(state) < -5.4


def test_half_precision_is_averaged_in_float32():
    params = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    step = ft.averaged(ft.step(ft.grad(lambda p, batch: batch * p["w"]), ft.optim.sgd(2.0**-7)), 0.99)
    rows = run(step, step.init(params), [torch.ones(1, dtype=torch.bfloat16)] * 20)
    state = rows[-1][0]
    seen = [row.params["w"].double().item() for row, _ in rows]
    assert len(set(seen)) == 20
    assert state.opt.average["w"].dtype == torch.float32
    weights = 0.99 ** numpy.arange(20)[::-1]
    assert abs(state.opt.average["w"].item() - numpy.average(seen, weights=weights)) < 1e-6
    assert ft.average(state)["w"].dtype == torch.bfloat16


def test_it_resumes_and_members_are_alone(tmp_path):
    step = made(ft.optim.piecewise(0.5, {2: 1.5}), start=2, every=2)
    check_resumes(step, step.init(net_params()), net_batches(5), tmp_path)
    check_members(step, net_batches(5))


def test_a_skipped_batch_is_not_averaged_where_the_guard_is_outside():
    bad = net_batch(4, 7)
    bad["x"][0] = torch.nan
    good = net_batches(3)
    plain = ft.step(ft.grad(net_loss), ft.optim.adam(0.05))
    outside, inside = ft.guard(ft.averaged(plain, 0.5)), ft.averaged(ft.guard(plain), 0.5)
    clean = run(made(0.5), made(0.5).init(net_params()), good)[-1][0]
    state = run(outside, outside.init(net_params()), [*good, bad])[-1][0]
    same_bits("as before the bad batch", ft.average(state), ft.average(clean))
    assert state.position == 4
    again = run(inside, inside.init(net_params()), [*good, bad])[-1][0]
    same_bits("params", again.params, clean.params)
    # The same params once more.
    expected = ft.tree.map(lambda a, p: (0.875 * a + p) / 1.875, ft.average(clean), clean.params)
    equal("average", ft.average(again), expected)


def test_steps_of_several_positions_pass_those_that_are_averaged():
    step = ft.averaged(ft.repeat(ft.step(ft.grad(net_loss), ft.optim.sgd(0.05)), 4), None, every=10)
    stacked = [ft.tree.stack(net_batches(4))] * 6
    rows = run(step, step.init(net_params()), stacked)
    # Positions 12 and 20 are the first at or after 10 and 20.
    expected = ft.tree.map(lambda a, b: (a + b) / 2, rows[2][0].params, rows[4][0].params)
    equal("average", ft.average(rows[-1][0]), expected)


def test_windows_are_averaged_one_by_one_inside_tbptt():
    params, loss, start = recurrent()
    batch = random_tree({"x": (2, 6, 3), "y": (2, 6, 2)}, 0)
    plain = ft.step(ft.grad(loss), ft.optim.adam(0.05))
    inside, outside = ft.tbptt(ft.averaged(plain, 0.5), 2, start), ft.averaged(ft.tbptt(plain, 2, start), 0.5)
    counts = [run(step, step.init(params), [batch] * 2)[-1][0].opt.taken for step in (inside, outside)]
    assert counts == [6, 2]


def test_decay_is_a_hyperparameter():
    step = made(held(0.5))
    rows = run(step, step.init(net_params()), net_batches(2))
    assert [metrics["decay"].item() for _, metrics in rows] == [0.0, 0.5]
    still = ft.with_hyper(rows[-1][0], decay_decay=0.0)
    after, _ = step(still, net_batch(4))
    same_bits("an average of one", ft.average(after), after.params)
    assert ft.hyper(after)["lr"] == 0.05


def test_averages_nest_and_are_found_in_any_step():
    both = ft.loss_scaled(ft.averaged(ft.averaged(ft.step(ft.grad(net_loss), ft.optim.sgd(0.1)), None), 0.0))
    state = run(both, both.init(net_params()), net_batches(3))[-1][0]
    same_bits("the outer", ft.average(state), state.params)
    inner = state._replace(opt=state.opt.inner.inner)
    assert inner.opt.taken == 3
    assert not torch.equal(ft.average(inner)["scale"], state.params["scale"])
    assert "uniform" in str(ft.explain(both))


@pytest.mark.parametrize("wrong", [1.0, -0.1, True, "0.9", ft.optim.constant(1.5)])
def test_a_decay_is_below_1(wrong):
    with pytest.raises(ft.ArgumentError, match="decay"):
        made(wrong)


def test_what_is_refused():
    for name, value in (("start", -1), ("every", 0), ("every", 1.5), ("carry", 1)):
        with pytest.raises(ft.ArgumentError, match=name):
            made(**{name: value})
    plain = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    with pytest.raises(ft.ArgumentError, match=r"takes a step.*ft\.averaged\(ft\.step"):
        ft.averaged(ft.grad(net_loss))
    with pytest.raises(ft.ArgumentError, match=r"donate outside, ft\.compiled\(ft\.averaged"):
        ft.averaged(ft.step(ft.grad(net_loss), ft.optim.sgd(0.1), donate=True))
    with pytest.raises(ft.ArgumentError, match=r"no average in this state.*SgdState.*ft\.averaged"):
        ft.average(ft.guard(plain).init(net_params()))
    with pytest.raises(ft.ArgumentError, match="there is none"):
        made(carry=True).init(net_params())
    state = made().init(net_params())
    with pytest.raises(ft.ArgumentError, match="carry=True"):
        ft.average(state, "carry")
    with pytest.raises(ft.ArgumentError, match="'params' or the 'carry'"):
        ft.average(state, "buffers")
    with pytest.raises(ft.TreeError, match=r"whose opt is Averaged; this one's is SgdState"):
        made()(plain.init(net_params()), net_batch(4))
    with pytest.raises(ft.TreeError, match=r"ft\.population\(ft\.averaged"):
        made()(ft.tree.stack([state, state]), net_batch(4))
    with pytest.raises(ft.TreeError, match=r"ft\.population\(ft\.averaged"):
        ft.averaged(ft.population(plain)).init([plain.init(net_params())])


def test_an_average_that_was_given_away_is_an_error():
    step = ft.repeat(ft.step(ft.grad(net_loss), ft.optim.sgd(0.1), donate=True), 1)
    state = step.init(net_params())
    step(state, ft.tree.stack(net_batches(1)))
    with pytest.raises(ft.DonatedError):
        ft.average(state)
