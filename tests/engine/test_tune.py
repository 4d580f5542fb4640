"""tune: what is measured, what is left alone, and what is taken."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params, recurrent

import functrain as ft
from functrain.core.reduce import gathered
from functrain.engine.candidates import Candidate, candidates
from functrain.engine.tune import Timing, Tuned, _fastest, _Runner
from functrain.testing import equal, same_bits

SGD = ft.optim.sgd(0.01)
MEDIAN = gathered("middle", lambda rows, weights: ft.tree.map(lambda leaf: leaf.median(0).values, rows))


def batches(examples=24, size=8):
    return ft.arrays(net_batch(examples)).batch(size)


def tuned(grad, *, carry=None, source=None, **settings):
    step = ft.step(grad, SGD)
    settings = {"steps": 1, "show": None, "workers": 2, **settings}
    return ft.tune(step, step.init(net_params(), carry=carry), source or batches(), **settings)


def plans(found):
    return {(row.how, row.parts, row.workers) for row in found.rows if math.isfinite(row.seconds)}


def reasons(found):
    return {row.how: row.note for row in found.rows if math.isinf(row.seconds)}


# --- algebra first ----------------------------------------------------------------------------------------------------


def test_a_linear_reducer_is_measured_over_parts_plans_and_workers_each_computation_once():
    found = tuned(ft.parallel(ft.grad(net_loss), 4), parts=[1, 2, 4], workers=[1, 2, 3, 3])
    loops, vmaps = {("loop", 2, 1), ("loop", 4, 1)}, {("vmap", 2, 1), ("vmap", 4, 1)}
    threads = {("threads", 2, 2), ("threads", 4, 2), ("threads", 4, 3)}
    assert plans(found) == {("fused", 4, 1)} | loops | threads | vmaps
    assert len(found.rows) == 8
    assert "as given" in found.rows[0].note


def test_parts_go_as_far_as_the_batch_does():
    assert {row.parts for row in tuned(ft.grad(net_loss), plans="loop").rows} == {1, 2, 4, 8}
    assert {row.parts for row in tuned(ft.grad(net_loss), plans="loop", source=batches(3, 3)).rows} == {1, 2}
    stacked = batches(8, 4).batch(2)
    step = ft.repeat(ft.step(ft.grad(net_loss), SGD), 2)
    found = ft.tune(step, step.init(net_params()), stacked, plans="loop", steps=1, show=None)
    assert {row.parts for row in found.rows} == {1, 2, 4}


@pytest.mark.parametrize(
    ("make", "carry", "own", "reason"),
    [
        (lambda g, _: ft.parallel(g, 4, MEDIAN), None, 4, "the reducer has to see the parts"),
        (lambda g, _: ft.parallel(g, 4, exact=True), None, 4, "exact=True asks for the bits of the tree"),
        (lambda _, c: ft.parallel(c, 4), carried_start(), 4, "the loss threads shared buffers"),
        (lambda _, c: c, carried_start(), 1, "the loss threads shared buffers"),
        (lambda g, _: ft.parallel(ft.parallel(g, 2, MEDIAN), 4), None, 4, "has a reducer that has to see its parts"),
    ],
)
def test_parts_that_belong_to_the_mathematics_or_to_the_bits_stay(make, carry, own, reason):
    grad = make(ft.grad(net_loss), ft.grad(carried_loss))
    found = tuned(grad, carry=carry)
    assert {row.parts for row in found.rows} == {own}
    assert reason in reasons(found)["fused"]
    chosen = found.step.grad
    assert (chosen is grad) or (chosen.reduce, chosen.exact) == (grad.reduce, grad.exact)


def test_parts_that_are_asked_for_are_measured_all_the_same():
    found = tuned(ft.parallel(ft.grad(net_loss), 4, MEDIAN), parts=[2, 3], plans=["loop", "vmap"])
    assert {row[:2] for row in found.rows[1:]} == {("loop", 2), ("loop", 3), ("vmap", 2), ("vmap", 3)}
    found = tuned(ft.parallel(ft.grad(carried_loss), 4), carry=carried_start(), parts=2, plans="loop")
    assert {row[:2] for row in found.rows[1:]} == {("loop", 2)}
    assert reasons(found) == {}


def test_exact_stays_and_so_do_the_bits():
    grad = ft.parallel(ft.grad(net_loss), 4, exact=True, workers=2)
    found = tuned(grad)
    assert plans(found) == {("threads", 4, 2), ("loop", 4, 1)}
    assert set(reasons(found)) == {"fused", "vmap"}
    step = ft.step(grad, SGD)
    for plan in candidates(step, ("loop", "threads"), None, [1, 2, 3], 8):
        same_bits("exact", plan.step(step.init(net_params()), net_batch(9))[0], step(step.init(net_params()), net_batch(9))[0])


GRADS = {
    "plain": lambda grad: grad,
    "mean": lambda grad: ft.parallel(grad, 3),
    "sum": lambda grad: ft.parallel(grad, 2, ft.reduce.sum),
    "middle": lambda grad: ft.parallel(grad, 3, MEDIAN),
}


@pytest.mark.parametrize("name", GRADS)
@given(size=st.integers(4, 13), seed=st.integers(0, 99))
def test_every_candidate_is_the_same_step(name, size, seed):
    step = ft.step(GRADS[name](ft.grad(keyed_loss)), SGD)
    state, batch = step.init(net_params(seed, torch.float64), seed=seed), net_batch(size, seed, torch.float64)
    expected = step(state, batch)
    found = list(candidates(step, ("fused", "loop", "threads", "vmap"), None, [2], size))
    assert len(found) > 3
    for plan in found:
        if plan.step is not None:
            equal(f"{plan[:3]}", plan.step(state, batch), expected)


def test_what_stands_around_the_parts_stays_there():
    monitored = ft.monitor(ft.parallel(ft.grad(net_loss), 4))
    found = tuned(monitored, parts=[2, 4], plans="loop")
    assert plans(found) == {("fused", 4, 1), ("loop", 2, 1), ("loop", 4, 1)}
    for grad in (monitored, ft.monitor(ft.grad(net_loss))):
        step = ft.step(grad, SGD)
        state = step.init(net_params(0, torch.float64))
        expected = step(state, net_batch(8, 0, torch.float64))
        assert "gradient.norm" in expected[1]
        for plan in candidates(step, ["loop", "vmap"], [2], None, 8):
            equal("monitored", plan.step(state, net_batch(8, 0, torch.float64)), expected)
    params, loss, start = recurrent()
    step = ft.step(ft.tbptt(ft.parallel(ft.grad(loss, lanes=True), 2, how="loop"), 3, start), SGD)
    state, batch = step.init(params), {"x": torch.randn(4, 6, 3), "y": torch.randn(4, 6, 2)}
    found = list(candidates(step, ["fused", "loop"], [2, 4], None, 4))
    assert [plan[:2] for plan in found] == [("loop", 2), ("fused", 2), ("loop", 4)]
    assert all(str(ft.explain(plan.step.grad)).startswith("tbptt, windows of 3") for plan in found)
    for plan in found:
        equal("truncated", plan.step(state, batch), step(state, batch))


# --- measuring --------------------------------------------------------------------------------------------------------


def slow(params, batch):
    """A loss whose calls cost far more than its examples."""
    extra = torch.eye(64)
    for _ in range(200):
        extra = extra @ extra
    return net_loss(params, batch)._replace(weights=batch["weight"] * extra[0, 0])


def test_the_fastest_is_taken_ready_to_use():
    grad = ft.parallel(ft.grad(slow), 16, how="loop")
    found = tuned(grad, source=batches(32, 32), steps=3, workers=1, plans=["fused", "loop"])
    assert found.step.grad.plan.how == "fused"
    rows = {row[:2]: row for row in found.rows}
    assert rows["loop", 16].ratio == 1.0
    assert rows["fused", 16].ratio < 0.5
    assert [row[:2] for row in found.rows if "taken" in row.note] == [("fused", 16)]
    assert all(0 < row.low <= row.seconds <= row.high for row in found.rows)
    state, _ = found.step(found.step.init(net_params()), net_batch(32))
    assert state.position == 1


def runner(how, parts, workers, *times):
    return _Runner(Candidate(how, parts, workers, None), "", times=list(times))


def test_within_the_noise_the_simplest_is_taken():
    own = runner("vmap", 4, 1, 1.0, 1.2, 1.4)
    loops = [runner("loop", parts, 1, 1.0, 1.1, 1.2) for parts in (8, 2)]
    threads = runner("threads", 2, 2, 0.9, 1.0, 1.3)
    fused = runner("fused", 8, 1, 1.0, 1.1, 1.3)
    assert _fastest([own, *loops, threads, fused]) is own
    own = runner("vmap", 4, 1, 2.0, 2.0, 2.0)
    assert _fastest([own, *loops, threads]) is loops[1]
    assert _fastest([own, *loops, threads, fused]) is fused
    clear = runner("threads", 8, 3, 0.4, 0.5, 0.6)
    assert _fastest([own, *loops, threads, clear]) is clear
    assert _fastest([own, runner("vmap", 2, 1), threads]) is threads


def test_a_batch_of_another_shape_is_left_out_and_the_states_own_batches_are_taken():
    seen = []

    def loss(params, batch):
        seen.append((len(batch["x"]), batch["x"][0, 0].item()))
        return net_loss(params, batch)

    source = batches(20, 8)
    step = ft.step(ft.grad(loss), SGD)
    state = step.init(net_params())._replace(position=torch.tensor(4))
    ft.tune(step, state, source, steps=4, show=None, parts=1)
    assert {size for size, _ in seen} == {8}
    assert seen[0][1] == source(1)["x"][0, 0]
    assert {first for _, first in seen} == {source(0)["x"][0, 0].item(), source(1)["x"][0, 0].item()}


def test_workers_that_draw_their_own_parts_are_timed_drawing():
    drawers = set()

    def seen(example):
        drawers.add(threading.current_thread().name.partition("_")[0])
        return example

    source = ft.arrays(net_batch(6)).map(seen).batch(3).deferred()
    found = tuned(ft.grad(net_loss), source=source, plans=["loop", "threads"])
    assert plans(found) == {("plain", 1, 1), ("loop", 2, 1), ("threads", 2, 2)}
    assert drawers == {threading.current_thread().name, "functrain-part"}


@pytest.mark.parametrize("donate", [False, True])
def test_the_callers_state_is_neither_changed_nor_given_away(donate):
    step = ft.step(ft.parallel(ft.grad(keyed_loss), 4), ft.optim.adamw(0.1), donate=donate)
    state = step.init(net_params(), seed=3)
    before = ft.tree.map(torch.clone, state)
    found = ft.tune(step, state, batches(), steps=2, show=None, workers=2)
    same_bits("state", state, before)
    assert found.step.donates == donate
    found.step(state, net_batch(8))


def test_a_compiled_step_stays_compiled_and_its_threads_are_looped():
    step = ft.compiled(ft.step(ft.parallel(ft.grad(net_loss), 2), SGD))
    state = step.init(net_params())
    found = ft.tune(step, state, batches(), plans=["fused", "threads"], steps=2, show=None)
    assert reasons(found) == {"threads": "inside a graph, threads are looped: see loop"}
    assert len(found.rows) == 2
    assert found.step is step
    found.step(state, net_batch(8))
    assert "compiled" in str(ft.explain(next(iter(candidates(step, ["loop"], None, None, 8))).step))


# --- what does not run ------------------------------------------------------------------------------------------------


def looking(params, batch):
    """A loss that looks at a value, which vmap forbids."""
    losses = net_loss(params, batch)
    return losses if losses.losses.sum().item() > 0 else losses._replace(losses=losses.losses * 2)


def test_a_plan_that_fails_is_a_row_with_the_reason():
    found = tuned(ft.parallel(ft.grad(looking), 2), parts=2)
    assert plans(found) == {("fused", 2, 1), ("loop", 2, 1), ("threads", 2, 2)}
    assert reasons(found)["vmap"].startswith("RuntimeError: vmap")


def test_a_plan_that_fails_may_be_the_steps_own():
    found = tuned(ft.parallel(ft.grad(looking), 2, how="vmap"), parts=2)
    assert found.rows[0].note.startswith("as given, RuntimeError: vmap")
    assert found.step.grad.plan.how == "fused"
    assert all(math.isnan(row.ratio) for row in found.rows)


def test_an_lstm_cannot_be_vmapped_and_its_lanes_are_cut():
    params, loss, start = recurrent()
    source = ft.arrays({"x": torch.randn(8, 6, 3), "y": torch.randn(8, 6, 2)}).batch(8)
    step = ft.tbptt(ft.step(ft.grad(loss, lanes=True), SGD), 3, start)
    found = ft.tune(step, step.init(params), source, parts=2, workers=2, steps=1, show=None)
    assert {("plain", 1, 1), ("loop", 2, 1), ("threads", 2, 2)} <= plans(found)
    assert "fused" not in reasons(found)
    # Without a word about its lanes, a carry would be shared by the parts: tbptt refuses that.
    step = ft.tbptt(ft.step(ft.grad(loss), SGD), 3, start)
    found = ft.tune(step, step.init(params), source, parts=2, workers=2, steps=1, show=None)
    assert plans(found) == {("plain", 1, 1)}
    assert "lane" in reasons(found)["loop"]


def test_a_loss_that_looks_at_its_batch_mates_is_not_cut():
    def loss(params, batch):
        losses = net_loss(params, batch)
        return losses._replace(losses=losses.losses * len(batch["x"]))

    found = tuned(ft.grad(loss), parts=2)
    assert plans(found) == {("plain", 1, 1)}
    assert all(note.startswith("another loss") for note in reasons(found).values())
    assert set(reasons(found)) == {"loop", "threads", "vmap"}


def test_when_nothing_runs_the_steps_own_error_is_raised():
    with pytest.raises(ft.LossError, match="reduction"):
        tuned(ft.parallel(ft.grad(lambda params, batch: net_loss(params, batch).losses.mean()), 2))


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_aligned():
    rows = (
        Timing("fused", 8, 1, 0.0105, 0.010, 0.0111, 1.0, "as given, taken"),
        Timing("threads", 16, 2, 1.5, 1.25, 1.75, 142.857, ""),
        Timing("vmap", 8, 1, math.inf, math.inf, math.inf, math.nan, "RuntimeError: no rule"),
        Timing("loop", 8, 1, 0.02, 0.02, 0.02, math.nan, ""),
    )
    assert str(Tuned(None, rows)).split("\n") == [
        "plan     parts  workers  ms a step             quartiles   ratio",
        "fused        8              10.500      10.000 to 11.100    1.00  as given, taken",
        "threads     16        2   1500.000  1250.000 to 1750.000  142.86",
        "vmap         8                                                    RuntimeError: no rule",
        "loop         8              20.000      20.000 to 20.000",
    ]


def test_the_table_is_shown_once_or_not_at_all(capsys):
    tables = []
    found = tuned(ft.parallel(ft.grad(net_loss), 2), parts=2, show=tables.append)
    assert tables == [str(found)]
    tuned(ft.parallel(ft.grad(net_loss), 2), parts=2, show=None)
    assert capsys.readouterr().out == ""
    tuned(ft.parallel(ft.grad(net_loss), 2), parts=2, show=print)
    assert capsys.readouterr().out.startswith("plan ")


STEP = ft.step(ft.grad(net_loss), SGD)
STATE = STEP.init(net_params())


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((ft.grad(net_loss), STATE, batches()), {}, "tune takes a step, got grad of function net_loss"),
        ((STEP, batches(), STATE), {}, "tune measures on a source of batches, got State: write ft.tune"),
        ((STEP, net_params(), batches()), {}, "expected a state as step.init"),
        ((STEP, STATE, batches().shard(8, 9)), {}, "the source has no batches"),
        ((STEP, STATE, batches()), {"steps": 0}, "steps must be an int of at least 1, got 0"),
        ((STEP, STATE, batches()), {"steps": True}, "steps must be an int of at least 1, got True"),
        ((STEP, STATE, batches()), {"parts": [2, 0]}, "parts must be ints of at least 1, got 0"),
        ((STEP, STATE, batches()), {"parts": []}, "got an empty list"),
        ((STEP, STATE, batches()), {"workers": 1.5}, "workers must be ints of at least 1, got 1.5"),
        ((STEP, STATE, batches()), {"plans": "auto"}, "plans are fused, loop, threads, vmap, got 'auto'"),
        ((ft.population(STEP), STATE, batches()), {}, "is not made of a gradient that could be replaced"),
    ],
)
def test_what_tune_refuses(arguments, settings, message):
    with pytest.raises(ft.ArgumentError, match=message):
        ft.tune(*arguments, show=None, **settings)


def test_a_state_that_was_given_away_is_refused():
    step = ft.step(ft.grad(net_loss), SGD, donate=True)
    state = step.init(net_params())
    step(state, net_batch(4))
    with pytest.raises(ft.DonatedError):
        ft.tune(step, state, batches(), show=None)
