"""Schedules: torch's schedulers are followed, ends are exact, numbers are differentiable, nothing is ever no number."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torchs

import functrain as ft
from functrain.core.optim import (
    Schedule,
    constant,
    cosine,
    exponential,
    inverse_root,
    join,
    linear,
    one_cycle,
    piecewise,
    restarts,
    warmup,
)
from functrain.testing import equal

# --- torch's schedulers -----------------------------------------------------------------------------------------------


def followed(scheduler, base, counts):
    """The rates that a scheduler of torch gives, one for each count."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    with warnings.catch_warnings():
        # SequentialLR calls its parts in a way that torch itself calls deprecated.
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        rates = scheduler(optimizer)
        found = []
        for count in range(counts):
            found.append(rates.get_last_lr()[0])
            optimizer.step()
            if count < counts - 1:
                rates.step()
    return torch.tensor(found, dtype=torch.float64)


def sequence(optimizer):
    parts = [
        torchs.LinearLR(optimizer, 0.1, 1.0, 5),
        torchs.ConstantLR(optimizer, 1.0, 1),
        torchs.CosineAnnealingWarmRestarts(optimizer, 4, 2, eta_min=0.01),
    ]
    return torchs.SequentialLR(optimizer, parts, [7, 12])


def noam(count):
    return 64**-0.5 * min((count + 1) ** -0.5, (count + 1) * 20**-1.5)


TORCH = {
    "constant": (constant(0.3), lambda o: torchs.ConstantLR(o, 1.0, 5), 20),
    "linear down": (linear(0.3, 0.03, 17), lambda o: torchs.LinearLR(o, 1.0, 0.1, 17), 40),
    "linear up": (linear(0.1, 0.3, 5), lambda o: torchs.LinearLR(o, 1 / 3, 1.0, 5), 9),
    "cosine": (cosine(0.3, 60, end=0.01), lambda o: torchs.CosineAnnealingLR(o, 60, eta_min=0.01), 61),
    "restarts": (restarts(0.3, 7), lambda o: torchs.CosineAnnealingWarmRestarts(o, 7, 2), 500),
    "restarts of one length": (
        restarts(0.3, 10, 1, end=0.02),
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 10, 1, eta_min=0.02),
        101,
    ),
    "restarts of one step": (restarts(0.3, 1, 3), lambda o: torchs.CosineAnnealingWarmRestarts(o, 1, 3), 400),
    "one cycle": (one_cycle(0.3, 50), lambda o: torchs.OneCycleLR(o, 0.3, 50), 50),
    "one cycle linear": (
        one_cycle(0.3, 33, pct_start=0.41, div_factor=10, final_div_factor=7, anneal_strategy="linear"),
        lambda o: torchs.OneCycleLR(o, 0.3, 33, pct_start=0.41, div_factor=10, final_div_factor=7, anneal_strategy="linear"),
        33,
    ),
    "one cycle that only falls": (one_cycle(0.3, 9, pct_start=0), lambda o: torchs.OneCycleLR(o, 0.3, 9, pct_start=0.0), 9),
    "exponential": (exponential(0.3, 0.97), lambda o: torchs.ExponentialLR(o, 0.97), 300),
    "exponential up": (exponential(0.3, 1.03, end=1e9), lambda o: torchs.ExponentialLR(o, 1.03), 300),
    "exponential staircase": (exponential(0.3, 0.5, every=7, staircase=True), lambda o: torchs.StepLR(o, 7, 0.5), 100),
    "piecewise": (piecewise(0.3, {3: 0.5, 11: 0.5, 12: 0.5}), lambda o: torchs.MultiStepLR(o, [3, 11, 12], 0.5), 30),
    "inverse_root": (inverse_root((64 * 20) ** -0.5, 20), lambda o: torchs.LambdaLR(o, lambda n: noam(n) / 0.3), 200),
    "inverse_root hold": (
        inverse_root(0.3, 20, hold=True),
        lambda o: torchs.LambdaLR(o, lambda n: math.sqrt(20 / max(n + 1, 20))),
        200,
    ),
    "join": (join({0: linear(0.03, 0.3, 5), 7: 0.3, 12: restarts(0.3, 4, end=0.01)}), sequence, 60),
}


@pytest.mark.parametrize("name", TORCH)
def test_torchs_schedulers_are_followed_over_their_whole_range(name):
    schedule, scheduler, counts = TORCH[name]
    expected = followed(scheduler, 0.3, counts)
    got = schedule(torch.arange(counts))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_ends_are_exact():
    # 0.1 + (0.7 - 0.1) is not 0.7.
    assert [linear(0.7, 0.1, 3)(n).item() for n in (0, 3, 4, 10**12)] == [0.7, 0.1, 0.1, 0.1]
    assert [cosine(0.7, 3, 0.1)(n).item() for n in (0, 3, 4, 10**12)] == [0.7, 0.1, 0.1, 0.1]
    assert [one_cycle(0.7, 20, pct_start=0.5)(n).item() for n in (9, 19, 20)] == [0.7, *[0.7 / 25 / 1e4] * 2]
    assert one_cycle(0.7, 20)(0) == 0.7 / 25
    assert [inverse_root(0.7, 9)(8).item(), inverse_root(0.7, 9, hold=True)(0).item()] == [0.7, 0.7]
    down, up = exponential(0.7, 0.1, end=0.3), exponential(0.7, 2, end=3)
    assert [down(0).item(), down(1).item(), up(0).item(), up(1).item(), up(10**12).item()] == [0.7, 0.3, 0.7, 1.4, 3.0]


@given(steps=st.integers(1, 1000), factor=st.integers(1, 7), cycle=st.integers(0, 30))
def test_every_restart_is_at_its_count_and_at_the_peak(steps, factor, cycle):
    begin = steps * sum(factor**k for k in range(cycle))
    schedule = restarts(0.7, steps, factor, 0.1)
    if begin < 10**12:
        assert schedule(begin) == 0.7
        before = steps * factor ** max(cycle - 1, 0)
        expected = 0.1 + 0.6 * 0.5 * (1 + math.cos(math.pi * (before - 1) / before)) if begin else 0.7
        assert schedule(max(begin - 1, 0)).item() == pytest.approx(expected, abs=1e-9)


# --- laws over all of them --------------------------------------------------------------------------------------------

RATES = st.floats(1e-9, 1e3)
STEPS = st.integers(1, 10**6) | st.integers(1, 20)
SIMPLE = st.one_of(
    st.builds(constant, RATES),
    st.builds(linear, RATES, RATES, STEPS),
    st.builds(cosine, RATES, STEPS, RATES),
    st.builds(restarts, RATES, STEPS, st.integers(1, 9), RATES),
    st.builds(
        one_cycle,
        RATES,
        STEPS,
        pct_start=st.floats(0, 1, exclude_max=True),
        anneal_strategy=st.sampled_from(["cos", "linear"]),
    ),
    st.builds(exponential, RATES, st.floats(1e-6, 1), every=STEPS, staircase=st.booleans()),
    st.builds(exponential, st.just(1.0), st.floats(1e-6, 1), end=st.floats(0, 1)),
    st.builds(exponential, st.just(1.0), st.floats(1, 1e6, exclude_min=True), every=STEPS, end=st.floats(1, 1e6)),
    st.builds(piecewise, RATES, st.dictionaries(STEPS, st.floats(0, 2), max_size=3)),
    st.builds(inverse_root, RATES, STEPS, hold=st.booleans()),
)
JOINED = st.dictionaries(STEPS, SIMPLE, max_size=3).flatmap(lambda rest: SIMPLE.map(lambda first: join({0: first, **rest})))
WARMED = st.builds(warmup, STEPS, (SIMPLE | JOINED).filter(lambda schedule: "warmup" not in schedule.values))
SCHEDULES = SIMPLE | JOINED | WARMED | JOINED.map(lambda inner: join({0: inner, 7: inner}))
COUNTS = st.integers(0, 40) | st.integers(0, 10**12) | st.sampled_from([10**k for k in range(13)])


def numbers(schedule):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in schedule.values.items()}


@settings(max_examples=200)
@given(schedule=SCHEDULES, count=COUNTS)
def test_values_and_derivatives_are_finite_at_every_count(schedule, count):
    value = schedule(count)
    assert (value.shape, value.dtype) == ((), torch.float64)
    slopes, again = torch.func.grad_and_value(lambda values: schedule.rule(torch.tensor(count), values))(numbers(schedule))
    assert again == value
    assert 0 <= value.item() <= 1e6
    assert all(slope.isfinite() for slope in slopes.values())


@settings(max_examples=60)
@given(schedule=SCHEDULES, counts=st.lists(COUNTS, min_size=1, max_size=5), scale=st.floats(0.5, 1))
def test_counts_and_numbers_may_be_vmapped(schedule, counts, scale):
    each = torch.stack([schedule(count) for count in counts])
    torch.testing.assert_close(schedule(torch.tensor(counts)), each, rtol=1e-12, atol=0)
    values = numbers(schedule)
    over_counts = torch.func.vmap(lambda count: schedule.rule(count, values))(torch.tensor(counts))
    torch.testing.assert_close(over_counts, each, rtol=1e-12, atol=0)
    rows = [values, {name: value * scale for name, value in values.items()}]
    count = torch.tensor(counts[0])
    together = torch.func.vmap(lambda row: schedule.rule(count, row))(ft.tree.stack(rows))
    torch.testing.assert_close(together, torch.stack([schedule.rule(count, row) for row in rows]), rtol=1e-12, atol=0)


SMOOTH = {
    "constant": constant(0.3),
    "linear": linear(0.3, 0.1, 10),
    "cosine": cosine(0.3, 10, 0.1),
    "restarts": restarts(0.3, 3, 2, 0.1),
    "restarts of one length": restarts(0.3, 5, 1),
    "one cycle": one_cycle(0.3, 12),
    "one cycle linear": one_cycle(0.3, 12, anneal_strategy="linear"),
    "exponential": exponential(0.3, 0.9, every=3),
    "exponential end": exponential(0.3, 0.9, end=0.2),
    "staircase": exponential(0.3, 0.9, every=3, staircase=True),
    "piecewise": piecewise(0.3, {2: 0.5, 5: 3.0}),
    "inverse_root": inverse_root(0.3, 4),
    "inverse_root hold": inverse_root(0.3, 4, hold=True),
    "warmup": warmup(4, cosine(0.3, 10)),
    "join": join({0: linear(0.1, 0.3, 3), 4: cosine(0.3, 8), 9: exponential(0.2, 0.8)}),
}
# Counts at which some rule has a corner or jumps in a number: derivatives are then one-sided. A factor of one has others
# beside it whose cycles are of another kind.
JUMPS = {"one cycle": {"pct_start"}, "restarts of one length": {"factor"}}


@pytest.mark.parametrize("name", SMOOTH)
def test_numbers_have_the_derivatives_that_differences_give(name):
    schedule, checked = SMOOTH[name], 0
    for count in range(14):
        for number, value in schedule.values.items():
            step = 1e-6 * max(1.0, abs(value))
            low, high = (schedule_with(schedule, number, value + shift)(count) for shift in (-step, step))
            left, right = (schedule(count) - low) / step, (high - schedule(count)) / step
            if abs(left - right) > 1e-3 or number in JUMPS.get(name, ()):
                continue
            rule = schedule.rule
            slope = torch.func.grad(lambda values, at=count, rule=rule: rule(torch.tensor(at), values))(numbers(schedule))[
                number
            ]
            assert slope.item() == pytest.approx(((high - low) / (2 * step)).item(), abs=1e-6), (number, count)
            checked += 1
    assert checked > 8


def schedule_with(schedule, number, value):
    return Schedule(schedule.name, schedule.rule, {**schedule.values, number: value})


def test_a_restarts_number_may_be_any_above_one():
    # Cycles of 4, 6 and 9 updates: factor 1.5 is not for construction, but a population or a derivative may come by.
    between = schedule_with(restarts(1.0, 4), "factor", 1.5)
    begins = torch.arange(20)[between(torch.arange(20)) == 1.0]
    assert begins.tolist() == [0, 4, 10, 19]


# --- in optimizers ----------------------------------------------------------------------------------------------------


def loss(params, batch):
    return (batch - params["w"]) ** 2


@pytest.mark.parametrize(
    ("schedule", "other", "changes"),
    [
        (linear(0.1, 0.0, 4), linear(0.3, 0.1, 9), {"lr_start": 0.3, "lr_end": 0.1, "lr_steps": 9}),
        (restarts(0.1, 4), restarts(0.3, 2, 3, 0.01), {"lr_peak": 0.3, "lr_steps": 2, "lr_factor": 3, "lr_end": 0.01}),
        (restarts(0.1, 4), restarts(0.1, 4, 1), {"lr_factor": 1}),
        (one_cycle(0.1, 9), one_cycle(0.2, 9, pct_start=0.5), {"lr_peak": 0.2, "lr_pct_start": 0.5}),
        (exponential(0.1, 0.9), exponential(0.1, 0.5, every=2), {"lr_factor": 0.5, "lr_every": 2}),
        (inverse_root(0.1, 3), inverse_root(0.2, 4), {"lr_peak": 0.2, "lr_warmup": 4}),
        (
            join({0: 0.1, 3: cosine(0.1, 5)}),
            join({0: 0.2, 4: cosine(0.3, 5)}),
            {"lr_part0_value": 0.2, "lr_at1": 4, "lr_part1_peak": 0.3},
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_numbers_in_the_state_may_be_replaced(schedule, other, changes):
    step = ft.step(ft.grad(loss), ft.optim.sgd(schedule))
    state = ft.with_hyper(step.init({"w": torch.zeros(())}), **changes)
    for count in range(9):
        state, metrics = step(state, torch.ones(3))
        torch.testing.assert_close(metrics["lr"], other(count), rtol=1e-12, atol=1e-15)


def test_compiled_rates_are_the_eager_ones():
    parts = ("restarts", "one cycle", "exponential end", "inverse_root")
    schedule = join({20 * place: SMOOTH[name] for place, name in enumerate(parts)})
    step = ft.step(ft.grad(loss), ft.optim.sgd(schedule))
    graph = ft.compiled(step, donate=False)
    state = step.init({"w": torch.zeros((), dtype=torch.float64)})
    for count in [*range(0, 90, 3), 10**6]:
        at = state._replace(opt=state.opt._replace(steps=torch.tensor(count)))
        (new, metrics), (expected, eager) = graph(at, torch.ones(2).double()), step(at, torch.ones(2).double())
        equal("compiled", (new, metrics), (expected, eager), 1e-12)
        assert metrics["lr"].item() == pytest.approx(schedule(count).item(), rel=1e-12)


def test_members_of_a_population_have_schedules_of_their_own():
    step = ft.step(ft.grad(loss), ft.optim.sgd(restarts(0.1, 3)))
    start = step.init({"w": torch.zeros(())})
    members = [ft.with_hyper(start, lr_steps=steps, lr_factor=factor) for steps, factor in ((1, 1), (2, 1), (2, 2), (3, 3))]
    state, rates = ft.population(step).init(members), []
    for _ in range(8):
        state, metrics = ft.population(step).update(state, torch.ones(2))
        rates.append(metrics["lr"])
    expected = [restarts(0.1, steps, factor)(torch.arange(8)) for steps, factor in ((1, 1), (2, 1), (2, 2), (3, 3))]
    torch.testing.assert_close(torch.stack(rates, 1), torch.stack(expected), rtol=1e-12, atol=1e-15)


# --- refusals ---------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(NAN), "value must be a finite number, got nan"),
        (lambda: constant(True), "value must be a finite number, got True"),
        (lambda: constant(torch.tensor(0.1)), r"value must be a finite number, got tensor\(.*ft.with_hyper"),
        (lambda: linear(0.1, INF, 10), "end must be a finite number, got inf"),
        (lambda: linear("fast", 0.1, 10), "start must be a finite number, got 'fast'"),
        (lambda: linear(0.1, 0.0, 0), "steps must be an int of at least 1, got 0"),
        (lambda: linear(0.1, 0.0, -3), "steps must be an int of at least 1, got -3"),
        (lambda: linear(0.1, 0.0, True), "steps must be an int of at least 1, got True"),
        (lambda: linear(0.1, 0.0, 2.5), "steps must be an int of at least 1, got 2.5"),
        (lambda: linear(0.1, 0.0, 10**400), "steps must be a finite number, got 1000"),
        (lambda: cosine(NAN, 10), "peak must be a finite number, got nan"),
        (lambda: cosine(0.1, 10, -INF), "end must be a finite number, got -inf"),
        (lambda: restarts(0.1, 10, 0), "factor must be an int of at least 1, got 0"),
        (lambda: restarts(0.1, 10, 1.5), "factor must be an int of at least 1, got 1.5"),
        (lambda: restarts(0.1, 0), "steps must be an int of at least 1, got 0"),
        (lambda: one_cycle(0.1, 10, pct_start=1.0), r"pct_start must be a finite number in \[0, 1\), got 1.0"),
        (lambda: one_cycle(0.1, 10, pct_start=-0.1), r"pct_start must be a finite number in \[0, 1\), got -0.1"),
        (lambda: one_cycle(0.1, 10, div_factor=0), "div_factor must be a finite number above 0, got 0"),
        (lambda: one_cycle(0.1, 10, final_div_factor=-1), "final_div_factor must be a finite number above 0, got -1"),
        (lambda: one_cycle(0.1, 10, anneal_strategy="cosine"), "anneal_strategy must be 'cos' or 'linear', got 'cosine'"),
        (lambda: exponential(0.1, 0.0), "factor must be a finite number above 0, got 0.0"),
        (lambda: exponential(0.1, -0.5), "factor must be a finite number above 0, got -0.5"),
        (lambda: exponential(0.1, NAN), "factor must be a finite number, got nan"),
        (lambda: exponential(0.1, 1.1), r"a factor of 1.1 grows without bound: say where it ends, exponential\(…, end=…\)"),
        (lambda: exponential(0.1, 1.1, end=0.01), "a factor of 1.1 ends at at least start"),
        (lambda: exponential(0.1, 0.9, end=0.2), "a factor of 0.9 ends at at most start"),
        (lambda: exponential(0.1, 0.9, end=-0.2), "end must be a finite number of at least 0, got -0.2"),
        (lambda: exponential(0.1, 0.9, every=0), "every must be an int of at least 1, got 0"),
        (lambda: piecewise(0.1, {3: NAN}), "factors must be a finite number, got nan"),
        (lambda: piecewise(NAN, {}), "start must be a finite number, got nan"),
        (lambda: inverse_root(0.1, 0), "warmup must be an int of at least 1, got 0"),
        (lambda: inverse_root(INF, 5), "peak must be a finite number, got inf"),
        (lambda: warmup(2, inverse_root(0.1, 5)), "warms up already"),
        (lambda: warmup(2, NAN), "value must be a finite number, got nan"),
        (lambda: join({}), r"join takes schedules by the counts \(ints\).*the first of them 0, got \[\]"),
        (lambda: join({5: 0.1}), r"the first of them 0, got \[5\]"),
        (lambda: join({0: 0.1, -5: 0.1}), r"got \[0, -5\]"),
        (lambda: join({0: 0.1, 2.5: 0.1}), r"got \[0, 2.5\]"),
        (lambda: join({False: 0.1}), r"got \[False\]"),
        (lambda: join([0.1, 0.2]), "the first of them 0, got list"),
        (lambda: join({0: 0.1, 5: "slow"}), "value must be a finite number, got 'slow'"),
    ],
)
def test_numbers_that_schedules_refuse(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def own(rule, **values):
    return Schedule("own", rule, values)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (own(lambda count, values: torch.log(-values["rate"] - count), rate=0.1), "lr is on the schedule own.*nan"),
        (own(lambda count, values: values["rate"] / torch.where(count < 50, 1.0, 0.0), rate=0.1), "inf at count 100"),
        (own(lambda count, values: values["rate"] * torch.sqrt(1 - count / 1000), rate=0.1), "nan at count 10000"),
        (own(lambda count, values: values["rate"] * (1 - count / 1000), rate=0.1), "-0.9 at count 10000"),
        (own(lambda count, values: values["rate"] * torch.ones(3), rate=0.1), r"gives a tensor \(3,\) at count 0"),
        (own(lambda count, values: 0.1), "gives float at count 0"),
        (own(lambda count, values: values["rate"], rate=NAN), "its numbers must be finite"),
        (linear(0.1, -0.1, 2), "-0.1 at count 2"),
        (join({0: 0.1, 700: linear(0.1, -0.1, 50)}), "-0.1 at count 1000"),
    ],
)
def test_schedules_that_go_wrong_are_found_when_the_optimizer_is_made(schedule, message):
    # A compiled update could not look at its rate.
    with pytest.raises(ft.ArgumentError, match=message):
        ft.optim.sgd(schedule)
