"""Law 13: a guard is transparent on finite values; on NaN and infinities it gives back the old state and says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import OPTIMIZERS, keyed_loss, net_batch, net_loss, net_params, recurrent

import functrain as ft
from functrain.testing import LawError, check_guard, check_step, equal, same_bits

# Where the first number that is not finite arises, by what is wrong with the batch.
SICK = {
    "loss": {"scale": float("inf")},
    "gradient": {"slope": 0.0},
    "carry": {"logarithm": 0.0},
    "optimizer": {"push": 1e30},
    "batch": {"x": float("nan")},
}


def loss(params, batch, *, carry, key):
    error = batch["x"] @ params["w"] - 1 + 0.1 * ft.random.normal(key, (), params["w"].dtype)
    # At slope = 0 the root is 0 and its derivative 0 · ∞; a push is a large gradient.
    root = (batch["slope"] * (params["b"].square() + 1)).sqrt()
    losses = batch["scale"] * error.square() + root + batch["push"] * params["w"].sum()
    return losses, {"seen": carry["seen"] + batch["logarithm"].log().mean(), "count": carry["count"] + 1}


def batch_of(size: int, seed: int, sick: str | None = None, dtype: torch.dtype = torch.float32):
    ones = torch.ones(size, dtype=dtype)
    x = ft.random.normal(ft.random.key(seed), (size, 3), dtype)
    batch = {"x": x, "slope": ones, "scale": ones, "push": 0 * ones, "logarithm": ones}
    for name, value in SICK.get(sick, {}).items():
        batch[name] = batch[name].clone()
        # One example is enough.
        batch[name][seed % size] = value**7 if dtype == torch.float64 and name == "push" else value
    return batch


def start(step, seed: int = 0, dtype: torch.dtype = torch.float32):
    params = {"w": ft.random.normal(ft.random.key(seed), (3,), dtype), "b": torch.ones((), dtype=dtype)}
    return step.init(params, carry={"seen": torch.zeros((), dtype=dtype), "count": torch.tensor(0)}, seed=seed)


def is_finite(tree) -> bool:
    return all(bool(leaf.double().isfinite().all()) for leaf in ft.tree.leaves(tree))


def passed_over(state):
    return state._replace(position=state.position + 1)


@pytest.mark.parametrize("sick", SICK)
def test_each_number_arises_where_it_is_said_to(sick):
    step = ft.step(ft.grad(loss), ft.optim.adam(0.1))
    state, metrics = step(start(step), batch_of(3, 0, sick))
    found = {"loss": metrics["loss"], "params": state.params, "optimizer": state.opt, "carry": state.carry}
    expected = {"gradient": {"params", "optimizer"}, "carry": {"carry"}, "optimizer": {"optimizer"}}
    assert {name for name, part in found.items() if not is_finite(part)} == expected.get(sick, {"loss", "params", "optimizer"})


@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    kinds=st.lists(st.sampled_from([None, *SICK]), min_size=1, max_size=6),
    size=st.integers(1, 4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_guarded_run_is_the_run_that_passes_over_bad_batches(name, kinds, size, seed, dtype):
    step = ft.step(ft.grad(loss), OPTIMIZERS[name](ft.optim.cosine(0.05, 9)))
    guarded = ft.guard(step)
    expected = state = start(step, seed, dtype)
    for place, sick in enumerate(kinds):
        # Only second moments overflow where gradients do not.
        sick = None if sick == "optimizer" and name not in ("adam", "adam decay", "adamw") else sick
        batch = batch_of(size, seed + place, sick, dtype)
        before = ft.tree.map(torch.clone, state)
        new, metrics = guarded(state, batch)
        same_bits("the state given", state, before)
        measured = step(expected, batch)[1]
        expected = passed_over(expected) if sick else step(expected, batch)[0]
        same_bits(f"step {place}, {sick}", new, expected)
        assert metrics["skipped"].item() == (sick is not None)
        assert metrics["skipped"].ndim == 0
        same_bits("metrics", {name: value for name, value in metrics.items() if name != "skipped"}, measured)
        state = new


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_checker_holds_for_every_optimizer(name):
    step = ft.step(ft.grad(loss), OPTIMIZERS[name](0.05))
    for sick in ("loss", "gradient", "carry", "batch"):
        check_guard(step, start(step), batch_of(3, 1), batch_of(3, 2, sick))
    with pytest.raises(LawError, match=r"skipped is 0\.0 for the bad batch"):
        check_guard(step, start(step), batch_of(3, 1), batch_of(3, 2))
    with pytest.raises(LawError, match=r"skipped is 1\.0 for the good batch"):
        check_guard(step, start(step), batch_of(3, 1, "loss"), batch_of(3, 2, "loss"))


def test_a_guarded_step_is_a_lawful_step():
    step = ft.guard(ft.step(ft.parallel(ft.grad(loss), 2, how="loop"), ft.optim.adamw(0.05)))
    check_step(step, start(step), [batch_of(3, place, sick) for place, sick in enumerate([None, "gradient", None])])


def test_what_was_not_finite_before_may_stay_so():
    def masked(params, batch, *, carry):
        return (params["w"] - batch) ** 2, {"mask": carry["mask"].roll(1), "half": carry["half"].log()}

    step = ft.step(ft.grad(masked), ft.optim.sgd(0.1))
    carry = {"mask": torch.tensor([0.0, -torch.inf]), "half": torch.tensor(2.0)}
    state = step.init({"w": torch.tensor(1.0)}, carry=carry)
    for sick in (False, False, True):
        old, (state, metrics) = state, ft.guard(step)(state, torch.ones(2))
        assert metrics["skipped"].item() == sick
    assert not state.carry["mask"].isfinite().all()
    # log log 2 < 0, whose logarithm is NaN.
    same_bits("carry", state.carry, old.carry)


# --- raising ------------------------------------------------------------------------------------------------------


def test_raise_is_transparent_on_finite_values():
    step = ft.step(ft.grad(loss), ft.optim.adam(0.1))
    state = start(step)
    same_bits("the step", ft.guard(step, "raise")(state, batch_of(3, 0)), step(state, batch_of(3, 0)))


@pytest.mark.parametrize(
    ("sick", "texts"),
    [
        ("batch", ["params.w would have 3 NaN and 0 infinite of 3 numbers, shape (3,)"]),
        ("gradient", ["params.b would have 1 NaN"]),
        ("carry", ["carry.seen would have 0 NaN and 1 infinite of 1 numbers, shape ()"]),
        ("optimizer", ["opt.second.w would have 0 NaN and 3 infinite of 3 numbers"]),
    ],
)
def test_raise_names_the_step_the_loss_and_what_is_not_finite(sick, texts):
    step = ft.step(ft.grad(loss), ft.optim.adam(0.1))
    guarded = ft.guard(step, policy="raise")
    state, _ = guarded(start(step), batch_of(3, 0))
    before = ft.tree.map(torch.clone, state)
    with pytest.raises(ft.NonFiniteError, match=r"step 2 \(the batch of position 1\)") as caught:
        guarded(state, batch_of(3, 3, sick))
    measured = step(state, batch_of(3, 3, sick))[1]["loss"].item()
    for text in [*texts, f"its loss is {measured}"]:
        assert text in str(caught.value)
    assert isinstance(caught.value, ArithmeticError)
    same_bits("the old state is whole", state, before)
    guarded(state, batch_of(3, 1))


# --- around and inside others -------------------------------------------------------------------------------------


def test_members_of_a_population_are_guarded_one_by_one():
    step = ft.guard(ft.step(ft.grad(net_loss), ft.optim.adam(0.05)))
    together = ft.population(step)
    members = [step.init(ft.tree.map(lambda leaf, size=size: leaf * size, net_params())) for size in (1.0, 1e30, 0.5)]
    state, alone = together.init(members), members
    for place in range(3):
        state, metrics = together(state, net_batch(4, place))
        assert metrics["skipped"].tolist() == [0.0, 1.0, 0.0]
        alone = [step(member, net_batch(4, place))[0] for member in alone]
        for number, (member, expected) in enumerate(zip(ft.tree.unstack(state), alone)):
            equal(f"member {number}", member, expected)
    same_bits("the second stayed", ft.tree.unstack(state)[1].params, members[1].params)
    assert state.position.tolist() == [3, 3, 3]
    with pytest.raises(ft.TreeError, match=r"ft\.population\(ft\.guard\(step\)\)"):
        ft.guard(together)(state, net_batch(4))


def test_a_compiled_guard_is_the_guard():
    def tiny(params, batch):
        return (params["w"] * batch).sqrt().sum(1)

    step = ft.step(ft.grad(tiny), ft.optim.sgd(0.1, momentum=0.9))
    guarded = ft.guard(step)
    batches = [torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), 2.0), -torch.ones(2, 3), torch.ones(2, 3)]
    for run in (ft.compiled(guarded), ft.guard(ft.compiled(step, donate=False))):
        state, expected = (guarded.init({"w": torch.tensor([1.0, 2.0, 3.0])}) for _ in range(2))
        skips = []
        for batch in batches:
            given = state
            state, metrics = run(state, batch)
            expected, _ = guarded(expected, batch)
            equal("the state", state, expected)
            skips.append(metrics["skipped"].item())
            if run.donates:
                with pytest.raises(ft.DonatedError):
                    run(given, batch)
        assert skips == [0, 1, 0, 1, 0]
    with pytest.raises(ft.ArgumentError, match=r"ft\.guard\(ft\.compiled\(step, donate=False\), 'raise'\)"):
        ft.compiled(ft.guard(step, "raise"))(state, batches[0])


def test_windows_are_guarded_one_by_one_or_all_together():
    params, over_time, begin = recurrent()
    step = ft.step(ft.grad(over_time), ft.optim.sgd(0.1))
    batch = {"x": torch.ones(2, 6, 3), "y": torch.zeros(2, 6, 2)}
    batch["y"][1, 3, 0] = torch.nan
    inside, outside = ft.tbptt(ft.guard(step), 2, begin), ft.guard(ft.tbptt(step, 2, begin))
    state = inside.init(params)
    new, metrics = inside(state, batch)
    assert metrics["skipped"].item() == pytest.approx(1 / 3)
    # The window in the middle has not been: neither its update nor its carry.
    short = ft.tree.map(lambda leaf: torch.cat([leaf[:, :2], leaf[:, 4:]], 1), batch)
    same_bits("params", new.params, ft.tbptt(step, 2, begin)(state, short)[0].params)
    new, metrics = outside(state, batch)
    assert metrics["skipped"].item() == 1
    same_bits("the old state", new, passed_over(state))
    both, metrics = ft.guard(inside)(state, batch)
    assert metrics["skipped"].item() == pytest.approx(1 / 3)
    same_bits("a guard around guards that have done their work", both.params, inside(state, batch)[0].params)


def test_repeated_steps_are_guarded_one_by_one_or_all_together():
    step = ft.step(ft.grad(keyed_loss), ft.optim.adam(0.05))
    bad = ft.tree.map(lambda leaf: leaf * torch.nan, net_batch(3))
    rows = [net_batch(3, 0), bad, net_batch(3, 2)]
    state = step.init(net_params())
    one_by_one, metrics = ft.repeat(ft.guard(step), 3)(state, ft.tree.stack(rows))
    assert metrics["skipped"].tolist() == [0, 1, 0]
    expected = step(passed_over(step(state, rows[0])[0]), rows[2])[0]
    same_bits("one by one", one_by_one, expected)
    together, metrics = ft.guard(ft.repeat(step, 3))(state, ft.tree.stack(rows))
    assert metrics["skipped"].item() == 1
    same_bits("all together", together, state._replace(position=state.position + 3))


def test_a_carry_may_change_its_shape_where_that_can_be_undone():
    def growing(params, batch, *, carry):
        return (params - batch) ** 2, torch.cat([carry, batch[:1]])

    step = ft.guard(ft.step(ft.grad(growing), ft.optim.sgd(0.1)))
    state = step.init(torch.tensor(0.0), carry=torch.zeros(1))
    for batch in (torch.ones(2), torch.tensor([torch.nan, 1.0]), torch.ones(2)):
        state, _ = step(state, batch)
    assert state.carry.tolist() == [0.0, 1.0, 1.0]
    together = ft.population(step)
    with pytest.raises(ft.TreeError, match=r"changes shapes: carry was \(3,\) and is \(4,\)"):
        together(together.init([state]), torch.ones(2))


def test_a_guard_is_remade_around_another_gradient():
    step = ft.guard(ft.step(ft.grad(net_loss), ft.optim.sgd(0.1)))
    other = step.remade(ft.parallel(ft.grad(net_loss), 2, how="loop"))
    assert ft.explain(other).title == "guard"
    assert "parallel" in str(ft.explain(other))
    assert "skip" in ft.explain(step).facts["policy"]
    bad = ft.tree.map(lambda leaf: leaf * torch.nan, net_batch(4))
    assert other(other.init(net_params()), bad)[1]["skipped"].item() == 1


def test_refusals():
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    for donating in (ft.compiled(step), ft.step(ft.grad(net_loss), ft.optim.sgd(0.1), donate=True)):
        with pytest.raises(ft.ArgumentError, match=r"donate outside, ft\.compiled\(ft\.guard\(step\)\)"):
            ft.guard(donating)
    with pytest.raises(ft.ArgumentError, match="'skip' or 'raise', got 'ignore'"):
        ft.guard(step, "ignore")
    with pytest.raises(ft.ArgumentError, match="guard takes a step"):
        ft.guard(ft.grad(net_loss))
    given = step.init(net_params())
    ft.step(ft.grad(net_loss), ft.optim.sgd(0.1), donate=True)(given, net_batch(2))
    with pytest.raises(ft.DonatedError):
        ft.guard(step)(given, net_batch(2))
    with pytest.raises(ft.ArgumentError, match="expected a state"):
        ft.guard(step)({"w": torch.ones(2)}, net_batch(2))


# --- a guarded run ------------------------------------------------------------------------------------------------


def experiment(wrap, values, epochs: int = 2) -> ft.Experiment:
    def tiny(params, batch):
        return ft.Losses((params - batch) ** 2, aux={"skipped": batch})

    source = ft.arrays(torch.tensor(values)).batch(2)
    return ft.Experiment(wrap(ft.step(ft.grad(tiny), ft.optim.sgd(0.25))), torch.tensor(0.0), source, epochs)


def test_a_guarded_run_goes_on_and_says_what_it_skipped(tmp_path):
    values = [1.0, 3.0, 1.0, float("nan"), 2.0]
    with pytest.raises(ft.RunError, match="the loss is nan at step 2"):
        ft.train(experiment(lambda step: step, values), ft.Run.create(tmp_path / "bare", {}, {}))
    rows = ft.train(experiment(ft.guard, values), ft.Run.create(tmp_path / "guarded", {}, {})).rows
    # Two batches an epoch are finite, (1, 3) and (2,): the params go 0, 1, 1.5, 1.75, 1.875.
    losses = [((1 + 9) + 1) / 3, ((0.25 + 2.25) + 0.0625) / 3]
    assert [row["train/loss"] for row in rows] == pytest.approx(losses)
    assert [row["train/skipped"] for row in rows] == [1.0, 1.0]
    # What a loss itself calls so is told apart.
    assert [row["train/aux.skipped"] for row in rows] == pytest.approx([2.0, 2.0])
    assert [row["position"] for row in rows] == [3, 6]


def test_a_guarded_run_is_resumed_inside_an_epoch(tmp_path):
    values = [1.0, 3.0, 1.0, float("nan"), 2.0]
    whole = ft.train(experiment(ft.guard, values), ft.Run.create(tmp_path / "whole", {}, {}))
    for stop in range(1, 6):
        asked = iter([False] * stop + [True])
        run = ft.Run.create(tmp_path / f"cut{stop}", {}, {})
        assert ft.train(experiment(ft.guard, values), run, interrupted=lambda asked=asked: next(asked, False)).interrupted
        again = ft.train(experiment(ft.guard, values), run)
        same_bits("state", again.state, whole.state)
        assert [{**row, "seconds": 0} for row in again.rows] == [{**row, "seconds": 0} for row in whole.rows]


def test_an_epoch_without_a_finite_step_is_told(tmp_path):
    trained = ft.train(experiment(ft.guard, [float("nan")] * 4, epochs=1), ft.Run.create(tmp_path / "run", {}, {}))
    (row,) = trained.rows
    assert row["train/skipped"] == 2
    assert row["train/loss"] != row["train/loss"]
    assert trained.state.params == 0
