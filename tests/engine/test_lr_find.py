"""lr_find: a quadratic diverges where theory says, the state is left alone, and what cannot be tested is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain.testing import same_bits


def bowl(curvature=1.0):
    """½ · curvature · p², whose descent diverges above a rate of 2 / curvature."""
    return ft.grad(lambda params, batch: 0.5 * curvature * params.square() + 0 * batch)


def start(step, value=1.0):
    return step.init(torch.tensor(value, dtype=torch.float64))


ZEROS = ft.arrays(torch.zeros(6, dtype=torch.float64)).batch(2)


def found(optimizer=None, curvature=1.0, **settings):
    step = ft.step(bowl(curvature), optimizer or ft.optim.sgd(0.1))
    return ft.lr_find(step, start(step), ZEROS, **settings)


# --- what is measured -------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    curvature=st.floats(0.5, 1e4),
    steps=st.integers(30, 200),
    smoothing=st.floats(0, 0.95),
)
def test_a_quadratic_has_its_closed_form(curvature, steps, smoothing):
    test = found(curvature=curvature, steps=steps, smoothing=smoothing, low=1e-6, high=100.0)
    rates = np.geomspace(1e-6, 100.0, steps)[: len(test.rates)]
    np.testing.assert_allclose(test.rates, rates, rtol=1e-12)
    shrinking = np.cumprod([1.0, *(1 - curvature * rates)])[: len(rates)]
    np.testing.assert_allclose(test.losses, 0.5 * curvature * shrinking**2, rtol=1e-6, atol=1e-12 * curvature)
    weights = [[smoothing ** (i - j) if j <= i else 0.0 for j in range(len(rates))] for i in range(len(rates))]
    np.testing.assert_allclose(test.smoothed, weights @ np.array(test.losses) / np.sum(weights, 1), rtol=1e-6, atol=1e-200)
    assert test.diverged
    assert rates[-1] > 2 / curvature


@settings(max_examples=8)
@given(curvature=st.floats(0.5, 1e4), steps=st.integers(50, 200))
def test_without_noise_the_minimum_is_the_rate_that_diverges(curvature, steps):
    test = found(curvature=curvature, steps=steps, smoothing=0, low=1e-6, high=100.0)
    factor = (100.0 / 1e-6) ** (1 / (steps - 1))
    # The first loss that rises is that after the first update beyond 2 / curvature.
    assert 2 / curvature <= test.minimum <= 2 / curvature * factor
    assert test.suggestion == test.minimum / 10
    assert test.steepest < test.minimum


@settings(max_examples=8)
@given(curvature=st.floats(0.5, 1e4), seed=st.integers(0, 100))
def test_with_noise_the_suggestion_is_safely_below_the_rate_that_diverges(curvature, seed):
    noise = ft.random.normal(ft.random.key(seed), (800,), torch.float64)
    step = ft.step(ft.grad(lambda params, batch: 0.5 * curvature * (params - 0.3 * batch).square()), ft.optim.sgd(0.1))
    test = ft.lr_find(step, start(step, 5.0), ft.arrays(noise).batch(8), low=1e-6, high=100.0)
    assert test.diverged
    assert 0.02 / curvature < test.suggestion < 1 / curvature
    assert test.steepest < test.minimum


def test_each_step_has_its_own_rate_and_losses_may_be_negative():
    # The gradient is 1: params are 3 less the rates so far.
    step = ft.step(ft.grad(lambda params, batch: params + 0 * batch), ft.optim.sgd(0.1))
    test = ft.lr_find(step, start(step, 3.0), ZEROS, low=1e-3, high=10, steps=50)
    rates = np.geomspace(1e-3, 10, 50)
    np.testing.assert_allclose(test.losses, 3 - np.cumsum([0, *rates[:-1]]), rtol=1e-9)
    assert not test.diverged
    assert test.minimum == test.rates[-1] == pytest.approx(10)
    assert "the loss did not diverge" in str(test)


def test_batches_are_those_from_the_states_position_on():
    source = ft.arrays(torch.arange(10.0, 15.0)).batch(1)
    step = ft.step(ft.grad(lambda params, batch: batch + 0 * params), ft.optim.sgd(0.1))
    state = step.init(torch.tensor(0.0))._replace(position=torch.tensor(3))
    expected = (13.0, 14.0, 10.0, 11.0, 12.0, 13.0, 14.0)
    assert ft.lr_find(step, state, source, steps=7).losses == expected
    with ft.prefetch(source, depth=2) as batches:
        assert ft.lr_find(step, state, batches, steps=7).losses == expected
    assert ft.lr_find(step, state, [torch.tensor([n]) for n in (11.0, 12.0)], steps=2).losses == (11.0, 12.0)


@pytest.mark.parametrize("kind", ["pure", "donating", "compiled"])
def test_the_state_is_left_alone_whatever_the_step_does_with_its_buffers(kind):
    def step(**settings):
        return ft.step(ft.grad(lambda params, batch: (params - batch).square()), ft.optim.sgd(0.1), **settings)

    source = ft.arrays(torch.arange(24.0).reshape(24, 1)).shuffle(seed=1).batch(8)
    settings = {"low": 1e-3, "high": 0.5, "steps": 12}
    runner = {"pure": step, "donating": lambda: step(donate=True), "compiled": lambda: ft.compiled(step())}[kind]()
    state = runner.init(torch.ones(1))
    before = ft.tree.map(torch.clone, state)
    test = ft.lr_find(runner, state, source, **settings)
    same_bits("untouched", state, before)
    expected = ft.lr_find(step(), before, source, **settings)
    assert len(set(expected.losses)) == 12
    np.testing.assert_allclose(test.losses, expected.losses, rtol=1e-5)
    runner(state, source(0))


# --- which hyperparameter ---------------------------------------------------------------------------------------------


def test_any_hyperparameter_may_be_the_one():
    test = found(ft.optim.sgd(0.5, weight_decay=0.1), name="weight_decay", low=1e-3, smoothing=0)
    # p ← p − ½ (1 + decay) p diverges above a decay of 3.
    assert test.name == "weight_decay"
    assert 3 <= test.minimum < 3.3


@pytest.mark.parametrize("name", ["lr", "lr_start", "lr_at0"])
def test_a_rate_on_a_schedule_is_not_for_testing(name):
    # The schedule would go on below the test: the rates tried would not be those of the table.
    with pytest.raises(ft.ArgumentError, match=f"'{name}' is of a schedule.*made with a plain number"):
        found(ft.optim.sgd(ft.optim.piecewise(0.1, {10**6: 0.5})), name=name)


def test_a_player_has_a_rate_and_a_loss_of_its_own():
    def player(name, curvature):
        return ft.grad(lambda params, batch: 0.5 * curvature * params[name].square() + 0 * batch), ft.optim.sgd(1e-3)

    step = ft.adversarial({"generator": player("generator", 4.0), "critic": player("critic", 100.0)})
    state = step.init({name: torch.tensor(1.0, dtype=torch.float64) for name in ("generator", "critic")})
    test = ft.lr_find(step, state, ZEROS, name="generator.lr", loss="generator.loss", low=1e-3, smoothing=0)
    assert 2 / 4 <= test.minimum < 2.2 / 4
    with pytest.raises(ft.ArgumentError, match=r"no metric 'loss.generator': loss= is one of .*'generator.loss'"):
        ft.lr_find(step, state, ZEROS, name="generator.lr", loss="loss.generator")
    with pytest.raises(ft.ArgumentError, match=r"no hyperparameter 'lr': expected one of .*'generator.lr'"):
        ft.lr_find(step, state, ZEROS)


def test_steps_around_steps():
    for policy in ("skip", "raise"):
        guarded = ft.guard(
            ft.step(ft.grad(lambda p, b: torch.where(p < 1e30, p.square(), torch.nan) + b), ft.optim.sgd(0.1)), policy
        )
        test = ft.lr_find(guarded, guarded.init(torch.tensor(1.0)), ft.arrays(torch.zeros(2)).batch(2), high=1e38)
        assert test.diverged
        assert all(map(math.isfinite, test.losses))
        assert len(test.rates) == len(test.losses) == len(test.smoothed)
    twice = ft.repeat(ft.step(bowl(), ft.optim.sgd(0.1)), 2)
    test = ft.lr_find(
        twice, start(twice), ft.arrays(torch.zeros(4, dtype=torch.float64)).batch(2).batch(2), low=1e-3, smoothing=0
    )
    first, second = 0.5, 0.5 * (1 - 1e-3) ** 2
    assert test.losses[0] == pytest.approx((first + second) / 2)
    assert test.diverged


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_table_has_the_marked_rows_and_the_suggestion():
    test = found(low=1e-4, high=100, steps=90)
    lines = str(test).splitlines()
    assert lines[0].split() == ["lr", "loss", "smoothed"]
    marked = {line.split()[-1]: line.split() for line in lines if line.endswith(("minimum", "steepest"))}
    place = test.rates.index(test.minimum)
    assert [float(cell) for cell in marked["minimum"][:3]] == [
        pytest.approx(number, rel=0.01) for number in (test.minimum, test.losses[place], test.smoothed[place])
    ]
    assert float(marked["steepest"][0]) == pytest.approx(test.steepest, rel=0.01)
    assert lines[-1] == f"suggestion: {test.suggestion:.2g} (a tenth of the minimum's)"
    assert len(lines) < 30


def test_a_loss_that_never_falls_has_no_suggestion():
    test = found(low=3.0, high=100.0, steps=20)
    assert (test.suggestion, test.steepest, test.diverged) == (None, None, True)
    assert str(test).endswith("the loss never fell: begin lower, or train from params that can still learn")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"low": 0.1, "high": 0.1}, "0 < low < high: got low=0.1, high=0.1"),
        ({"low": 1.0, "high": 0.1}, "0 < low < high: got low=1, high=0.1"),
        ({"low": 0.0}, "0 < low < high: got low=0, high=10"),
        ({"low": -1.0}, "0 < low < high: got low=-1, high=10"),
        ({"high": math.inf}, "high must be a finite number, got inf"),
        ({"low": math.nan}, "low must be a finite number, got nan"),
        ({"low": True}, "low must be a finite number, got True"),
        ({"steps": 1}, "steps must be an int of at least 2, got 1"),
        ({"steps": 5.0}, "steps must be an int of at least 2, got 5.0"),
        ({"smoothing": 1.0}, r"smoothing must be a number in \[0, 1\), got 1"),
        ({"name": "rate"}, "no hyperparameter 'rate': expected one of 'lr'"),
    ],
)
def test_numbers_that_are_refused(numbers, message):
    with pytest.raises(ft.ArgumentError, match=message):
        found(**numbers)


def test_what_else_is_refused():
    step = ft.step(bowl(), ft.optim.sgd(0.1))
    state = start(step)
    with pytest.raises(ft.ArgumentError, match=r"lr_find takes a step.*ft.lr_find\(step, state, source\)"):
        ft.lr_find(bowl(), state, ZEROS)
    with pytest.raises(ft.ArgumentError, match="the source has no batches"):
        ft.lr_find(step, state, ft.arrays(torch.zeros(2)).batch(1).shard(3, 4))
    members = ft.population(step)
    with pytest.raises(ft.TreeError, match=r"state of a population.*ft.tree.unstack\(state\)\[0\]"):
        ft.lr_find(members, members.init([state, state]), ZEROS)
    with pytest.raises(ft.PositionError, match="after 2 of 100 steps"):
        ft.lr_find(step, state, [ZEROS(0), ZEROS(1)])
    with pytest.raises(ft.NonFiniteError, match=r"the loss is nan before any update.*position 0"):
        ft.lr_find(step, start(step, math.nan), ZEROS)
    given_away = ft.step(bowl(), ft.optim.sgd(0.1), donate=True)
    old = start(given_away)
    given_away(old, ZEROS(0))
    with pytest.raises(ft.DonatedError):
        ft.lr_find(given_away, old, ZEROS)
