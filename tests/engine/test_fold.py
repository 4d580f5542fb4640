"""fold and evaluate: steps one after another over sources, and measures over whole ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params

import functrain as ft
from functrain.testing import equal, same_bits

STEP = ft.step(ft.grad(keyed_loss), ft.optim.adam(0.01))


def source(size=13, batch=4):
    return ft.arrays(net_batch(size)).shuffle(seed=1).batch(batch)


def ends(batches, state, **keywords):
    rows = list(ft.fold(STEP, state, batches, **keywords))
    return rows[-1][0] if rows else state


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_stopping_and_going_on_is_one_run(depth):
    def run(state, steps):
        if not depth:
            return ends(source(), state, steps=steps)
        with ft.prefetch(source(), depth=depth) as batches:
            return ends(batches, state, steps=steps)

    whole = ends(source(), STEP.init(net_params()), steps=10)
    assert whole.position == 10
    for stop in (0, 1, 4, 9):
        same_bits(f"stopped at {stop}", run(run(STEP.init(net_params()), stop), 10 - stop), whole)


def test_without_steps_to_the_end_of_the_epoch():
    state = STEP.init(net_params())
    assert ends(source(), state).position == 4
    assert ends(source(), ends(source(), state, steps=6)).position == 8
    plain = [source().epoch(place // 4)(place % 4) for place in range(6)]
    same_bits("an iterable", ends(plain, state), ends(source(), state, steps=6))
    assert ends(iter(plain), state, steps=2).position == 2
    with pytest.raises(ft.ArgumentError, match="no end: say how many steps"):
        ends(source().repeat(), state)
    with pytest.raises(ft.PositionError, match="ended after 6 of 7 steps"):
        ends(plain, state, steps=7)
    for steps in (-1, 1.0, True):
        with pytest.raises(ft.ArgumentError, match="steps must be an int of at least 0"):
            ends(plain, state, steps=steps)


def test_fold_takes_no_batch_more_than_it_uses():
    taken = []
    endless = (taken.append(place) or net_batch(2, place) for place in itertools.count())
    ends(endless, STEP.init(net_params()), steps=3)
    assert taken == [0, 1, 2]


@given(size=st.integers(1, 20), batch=st.integers(1, 7), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_evaluate_is_the_mean_over_all_examples_however_they_are_cut(size, batch, dtype):
    params, data = net_params(0, dtype), net_batch(size, 0, dtype)
    losses = net_loss(params, data)
    weights = losses.weights.double()
    got = ft.evaluate(net_loss, params, ft.arrays(data).batch(batch))
    expected = {
        "loss": (losses.losses.double() * weights).sum() / weights.sum(),
        "size": (losses.aux["size"].double() * weights).sum() / weights.sum(),
    }
    assert all(isinstance(value, float) for value in got.values())
    equal("means", {name: torch.tensor(value, dtype=torch.float64) for name, value in got.items()}, expected, 1e-6)


def test_evaluate_has_randomness_and_carry_of_its_own():
    params, batches = net_params(), list(source())
    first = ft.evaluate(keyed_loss, params, batches, seed=1)
    assert first == ft.evaluate(keyed_loss, params, batches, seed=1)
    assert first != ft.evaluate(keyed_loss, params, batches, seed=2)
    carry = carried_start()
    kept = ft.tree.map(torch.clone, carry)
    one = ft.evaluate(carried_loss, params, batches[:1], carry=carry)
    assert one == ft.evaluate(carried_loss, params, batches[:1] * 3, carry=carry)
    same_bits("carry", carry, kept)


def test_what_evaluate_refuses():
    with pytest.raises(ft.ArgumentError, match="no end"):
        ft.evaluate(net_loss, net_params(), source().repeat())
    with pytest.raises(ft.ArgumentError, match="no batches"):
        ft.evaluate(net_loss, net_params(), [])
    with pytest.raises(ft.LossError, match="0-d tensor"):
        ft.evaluate(lambda params, batch: batch.mean(), {}, [torch.ones(2)])


def test_an_experiment_checks_itself():
    first = ft.Experiment(STEP, net_params(), source(), 2, seed=4)
    assert first.steps == 8
    same_bits("initial", first.initial(), STEP.init(net_params(), seed=4))
    assert "2 of 4 steps" in str(ft.explain(first))
    for wrong, message in (
        ({"step": net_loss}, "step is what"),
        ({"epochs": -1}, "at least 0"),
        ({"epochs": True}, "at least 0"),
        ({"train": source().repeat()}, "finite source"),
    ):
        with pytest.raises(ft.ArgumentError, match=message):
            ft.Experiment(**{"step": STEP, "params": net_params(), "train": source(), "epochs": 1} | wrong)


# --- steps that take several batches at once --------------------------------------------------------------------------


def pulled(params, batch):
    return (batch - params) ** 2


def taking(count):
    step = ft.step(ft.grad(pulled), ft.optim.sgd(0.1))
    source = ft.arrays(torch.arange(24.0)).batch(2)
    return step, source, ft.repeat(step, count), source.batch(count)


@pytest.mark.parametrize("around", [lambda step: step, ft.guard, ft.averaged, lambda step: ft.guard(ft.averaged(step))])
def test_a_fold_of_repeated_steps_counts_positions_and_goes_on_where_it_was(around):
    step, source, repeated, stacks = taking(4)
    repeated = around(repeated)
    assert repeated.takes == 4
    state, expected = repeated.init(torch.tensor(0.0)), step.init(torch.tensor(0.0))
    for steps in (4, 8):
        for state, _ in ft.fold(repeated, state, stacks, steps=steps):
            pass
        for expected, _ in ft.fold(step, expected, source, steps=steps):
            pass
        assert int(state.position) == int(expected.position)
        ft.testing.same_bits(f"after {steps}", state.params, expected.params)


def test_positions_that_stacks_do_not_meet_are_refused():
    step, source, repeated, stacks = taking(4)
    state = step.init(torch.tensor(0.0))
    with pytest.raises(ft.ArgumentError, match="takes 4 batches at once: steps must be a multiple"):
        next(ft.fold(repeated, state, stacks, steps=6))
    state, _ = step(state, source(0))
    with pytest.raises(ft.PositionError, match="position 1, inside a stack of 4"):
        next(ft.fold(repeated, state, stacks, steps=4))


def test_a_fold_from_a_state_that_was_given_away_says_so():
    step, source, *_ = taking(2)
    state = step.init(torch.tensor(0.0))
    ft.step(ft.grad(pulled), ft.optim.sgd(0.1), donate=True)(state, source(0))
    with pytest.raises(ft.DonatedError):
        next(ft.fold(step, state, source, steps=1))


def test_training_with_repeated_steps_logs_the_rows_of_single_ones(tmp_path):
    step, source, repeated, stacks = taking(3)
    rows, finals = [], []
    for name, (train, batches) in {"single": (step, source), "repeated": (repeated, stacks)}.items():
        experiment = ft.Experiment(train, torch.tensor(0.0), batches, 2)
        done = ft.train(experiment, ft.Run.create(tmp_path / name, config={}, facts={}))
        finals.append(done.state.params)
        rows.append([(row["epoch"], row["position"], row["train/loss"]) for row in done.rows])
    ft.testing.same_bits("the same run", *finals)
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]] == [(1, 12), (2, 24)]
    ft.testing.equal("losses", *(torch.tensor([row[2] for row in each]) for each in rows))
