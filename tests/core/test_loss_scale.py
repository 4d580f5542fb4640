"""Dynamic loss scaling: against torch's GradScaler and the documented rule, transparent elsewhere, and what is refused."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import (
    PLANS,
    REDUCERS,
    carried_loss,
    carried_start,
    keyed_loss,
    net_batch,
    net_loss,
    net_params,
    plain_loss,
    random_tree,
    recurrent,
)
from wrapped_steps import check_members, check_resumes, net_batches, run

import functrain as ft
from functrain.testing import equal, same_bits

half_loss = ft.mixed(plain_loss, "compute=float16")


def scaled(loss=half_loss, optimizer=None, **options):
    return ft.loss_scaled(ft.step(ft.grad(loss), optimizer or ft.optim.sgd(0.05, momentum=0.9)), **options)


# --- the rule -----------------------------------------------------------------------------------------------------------


def test_it_follows_grad_scaler():
    params = net_params()
    leaves = [leaf.clone().requires_grad_() for leaf in ft.tree.leaves(params)]
    optimizer = torch.optim.SGD(leaves, 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    step = scaled(initial=2.0**22, patience=3)
    state, skips = step.init(params), []
    for batch in net_batches(30, 8):
        assert state.opt.scale == scaler.get_scale()
        optimizer.zero_grad()
        theirs = ft.tree.unflatten(ft.tree.structure(params), leaves)
        scaler.scale(half_loss(theirs, batch).losses.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        state, metrics = step(state, batch)
        skips.append(metrics["skipped"].item())
        equal("params", ft.tree.leaves(state.params), [leaf.detach() for leaf in leaves], 1e-6)
    assert skips[0] == 1.0
    assert 0 < sum(skips) < 20


def rule(finite, initial, factor, patience, least):
    """The scale before each step and at the end, as it is documented, one number at a time."""
    scale, good = numpy.float32(initial), 0
    for fine in finite:
        yield scale
        good += 1
        with numpy.errstate(over="ignore"):
            grown = scale * numpy.float32(factor)
        if not fine:
            scale, good = max(numpy.float32(least), scale / numpy.float32(factor)), 0
        elif good == patience:
            scale, good = grown if numpy.isfinite(grown) else scale, 0
    yield scale


@given(
    finite=st.lists(st.booleans(), max_size=12),
    initial=st.sampled_from([1.0, 3.0, 2.0**15, 2.0**127]),
    factor=st.sampled_from([2.0, 10.0]),
    patience=st.integers(1, 4),
    least=st.sampled_from([1.0, 0.5]),
)
def test_the_scale_is_that_of_the_rule(finite, initial, factor, patience, least):
    options = {"initial": initial, "factor": factor, "patience": patience, "least": least}
    # Such small numbers that no scale makes them infinite.
    step = scaled(lambda params, batch: params * batch, ft.optim.sgd(1.0), **options)
    state = step.init(torch.tensor(0.0))
    *expected, last = rule(finite, **options)
    for fine, scale in zip(finite, expected):
        old = state
        state, metrics = step(state, torch.tensor([1e-6 if fine else torch.inf]))
        assert metrics["scale"].item() == scale
        assert metrics["skipped"] == (not fine)
        assert state.position == old.position + 1
        if fine:
            assert (state.params - old.params + 1e-6).abs() < 1e-12
        else:
            same_bits("skipped", (state.params, state.opt.inner), (old.params, old.opt.inner))
    assert state.opt.scale.item() == last


def test_what_underflows_without_a_scale_does_not_with_it():
    def tiny(params, batch):
        # 2⁻²⁶ and less: nothing, in float16.
        return (torch.tanh(batch["x"] @ params["w"]) * 2.0**-13).sum(1) * 2.0**-13

    params, batch = {"w": random_tree((3, 2), 1)}, net_batch(8)
    moved = {}
    for name, step in (
        ("float32", ft.step(ft.grad(tiny), ft.optim.sgd(1e8))),
        ("float16", ft.step(ft.grad(ft.mixed(tiny, "compute=float16")), ft.optim.sgd(1e8))),
        ("scaled", scaled(ft.mixed(tiny, "compute=float16"), ft.optim.sgd(1e8))),
    ):
        new, metrics = step(step.init(params), batch)
        moved[name] = new.params["w"] - params["w"]
    assert not moved["float16"].any()
    equal("scaled", moved["scaled"], moved["float32"], 0.01)
    assert moved["float32"].abs().min() > 1e-4
    assert metrics["skipped"] == 0


def test_what_overflows_at_first_recovers():
    step = scaled(initial=2.0**30, patience=1000)
    start = step.init(net_params())
    rows = run(step, start, [net_batch(8)] * 60)
    skipped = [metrics["skipped"].item() for _, metrics in rows]
    first = skipped.index(0.0)
    assert 5 < first < 20
    assert not any(skipped[first:])
    same_bits("while it overflows", rows[first - 1][0].params, start.params)
    same_bits("the optimizer", rows[first - 1][0].opt.inner, start.opt.inner)
    assert [metrics["scale"].item() for _, metrics in rows[: first + 1]] == [2.0 ** (30 - n) for n in range(first + 1)]
    losses = [metrics["loss"] for _, metrics in rows]
    # Of the unscaled loss, at the same params: what is skipped is measured.
    same_bits("losses", losses[0], losses[first])
    full = ft.grad(plain_loss).finished(net_params(), net_batch(8))
    equal("without scale", losses[0], full.loss, 0.01)
    assert losses[-1] < 0.5 * losses[0]


def test_a_carry_that_overflowed_is_not_kept():
    step = ft.loss_scaled(ft.step(ft.grad(carried_loss), ft.optim.sgd(0.05)))
    bad = net_batch(4)
    bad["x"][1] = torch.inf
    start = step.init(net_params(), carry=carried_start())
    state, metrics = step(start, bad)
    same_bits("carry", state.carry, start.carry)
    assert metrics["skipped"] == 1


# --- everywhere else it is not seen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_see_plain_gradients(name):
    grad = ft.parallel(ft.grad(keyed_loss), 6, REDUCERS[name])
    plain = ft.step(grad, ft.optim.adam(0.01))
    rows = [run(step, step.init(net_params(), seed=3), net_batches(2, 7)) for step in (plain, ft.loss_scaled(plain))]
    (state, expected), (again, got) = rows[0][-1], rows[1][-1]
    # The scale is a power of two: not a bit is lost. (Examples are told apart in another way.)
    law = equal if REDUCERS[name].scale else same_bits
    law("params", again.params, state.params)
    law("metrics", {name: got[name] for name in expected}, expected)
    assert got.keys() - expected.keys() == {"skipped", "scale"}


@pytest.mark.parametrize("how", PLANS)
def test_every_plan_and_monitors(how):
    grad = ft.monitor(ft.parallel(ft.grad(net_loss), 3, how=how, workers=2), paths=True)
    plain = ft.step(grad, ft.optim.adam(0.01))
    first, second = (run(step, step.init(net_params()), net_batches(2, 7))[-1] for step in (plain, ft.loss_scaled(plain)))
    equal("params", second[0].params, first[0].params)
    # What is measured by path has the names that it had.
    assert second[1].keys() - first[1].keys() == {"skipped", "scale"}
    assert {"size", "gradient.norm.hidden.w"} <= first[1].keys()


def test_one_overflow_among_the_parts_is_enough():
    half = ft.mixed(lambda params, batch: params * batch, "compute=float16")
    # sign_vote makes 1 of an infinity, the median leaves it out: what comes out is finite.
    for name in ("sign_vote", "median"):
        step = ft.loss_scaled(ft.step(ft.parallel(ft.grad(half), 3, REDUCERS[name]), ft.optim.sgd(1.0)))
        batch = torch.tensor([1.0, 3.0, 1.0])
        state, metrics = step(step.init(torch.tensor(1.0)), batch)
        assert metrics["skipped"] == 1
        assert state.params == 1


def test_examples_are_clipped_without_scale():
    clip = ft.reduce.clip_per_example(0.5)
    grad = ft.parallel(ft.grad(half_loss), 2, clip)
    step, plain = (
        ft.loss_scaled(ft.step(grad, ft.optim.sgd(1.0)), initial=2.0**10),
        ft.step(ft.parallel(ft.grad(plain_loss), 2, clip), ft.optim.sgd(1.0)),
    )
    first, second = (one(one.init(net_params()), net_batch(7)) for one in (step, plain))
    assert first[1]["skipped"] == 0
    equal("params", first[0].params, second[0].params, 0.01)


def test_the_gradient_of_an_entry():
    grad = ft.parallel(ft.grad(lambda p, batch: (batch * p["x"]) ** 2, of=("x",)), 2, ft.reduce.clip_per_example(1.0))
    plain = ft.step(grad, ft.optim.sgd(0.1))
    params, batch = {"x": torch.tensor(2.0)}, torch.tensor([1.0, 0.1, 3.0])
    same_bits("an entry", *(step(step.init(params), batch)[0].params for step in (ft.loss_scaled(plain), plain)))


def test_derivatives_through_it_are_those_of_the_step():
    params, batch = net_params(0, torch.float64), net_batch(5, dtype=torch.float64)
    flat, spec = ft.tree.flatten(params)
    plain = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))

    def slopes(step):
        def end(*leaves):
            state, _ = step(step.init(ft.tree.unflatten(spec, leaves)), batch)
            return sum(leaf.square().sum() for leaf in ft.tree.leaves(state.params))

        return torch.func.grad(end, argnums=tuple(range(len(flat))))(*flat)

    equal("second order", slopes(ft.loss_scaled(plain)), slopes(plain))


def test_a_measure_called_scale_keeps_out_of_the_way():
    def loss(params, batch):
        return ft.Losses(batch * params, aux={"scale": batch, "loss": batch})

    step = scaled(loss)
    _, metrics = step(step.init(torch.tensor(1.0)), torch.tensor([3.0]))
    found = {name: metrics[name].item() for name in metrics}
    assert found == {"loss": 3, "weight": 1, "aux.scale": 3, "aux.loss": 3, "skipped": 0, "scale": 2.0**15}


# --- with other steps around and inside --------------------------------------------------------------------------------


def test_it_resumes_and_members_are_alone(tmp_path):
    step = scaled(initial=2.0**22, patience=2)
    check_resumes(step, step.init(net_params()), net_batches(6), tmp_path)
    check_members(step, net_batches(6))


def test_members_have_scales_of_their_own():
    step = scaled(lambda params, batch: params * batch, ft.optim.sgd(1.0), patience=1)
    alone = step.init(torch.tensor(1.0))
    members = ft.population(step)
    large = alone._replace(opt=alone.opt._replace(scale=torch.tensor(2.0**120)))
    state, metrics = members(members.init([alone, large]), torch.tensor([1e9]))
    assert metrics["skipped"].tolist() == [0.0, 1.0]
    assert state.opt.scale.tolist() == [2.0**16, 2.0**119]


def test_guards_leave_overflow_to_it():
    plain = ft.step(ft.grad(half_loss), ft.optim.sgd(0.05, momentum=0.9))
    options = {"initial": 2.0**24, "patience": 3}
    rows = []
    for step in (
        ft.loss_scaled(plain, **options),
        ft.guard(ft.loss_scaled(plain, **options)),
        ft.guard(ft.loss_scaled(plain, **options), "raise"),
        ft.loss_scaled(ft.guard(plain), **options),
    ):
        rows.append(run(step, step.init(net_params()), net_batches(15, 8)))
    assert 0 < sum(metrics["skipped"] for _, metrics in rows[0]) < 15
    for other in rows[1:]:
        same_bits("with a guard", other, rows[0])


def test_windows_have_scales_or_share_one():
    params, loss, start = recurrent()
    batch = random_tree({"x": (2, 6, 3), "y": (2, 6, 2)}, 0)
    half = ft.mixed(loss, "compute=float16")

    def begun(batch):
        return tuple(leaf.half() for leaf in start(batch))

    plain = ft.step(ft.grad(half), ft.optim.sgd(0.05))
    reference = ft.tbptt(ft.step(ft.grad(loss), ft.optim.sgd(0.05)), 2, start)
    expected = run(reference, reference.init(params), [batch] * 2)[-1][0]
    inside = ft.tbptt(ft.loss_scaled(plain, initial=2.0**8, patience=1), 2, begun)
    outside = ft.loss_scaled(ft.tbptt(plain, 2, begun), initial=2.0**8, patience=1)
    in_the_gradient = ft.loss_scaled(ft.step(ft.tbptt(ft.grad(half), 2, begun), ft.optim.sgd(0.05)), initial=2.0**8, patience=1)
    scales = []
    for step in (inside, outside, in_the_gradient):
        state, metrics = run(step, step.init(params), [batch] * 2)[-1]
        scales.append(state.opt.scale.item())
        assert metrics["skipped"] == 0
        if step is not in_the_gradient:
            equal("params", state.params, expected.params, 0.01)
    assert scales == [2.0**14, 2.0**10, 2.0**10]


def test_several_steps_in_one_share_a_scale():
    plain = ft.step(ft.grad(net_loss), ft.optim.adam(0.05))
    step, reference = ft.loss_scaled(ft.repeat(plain, 2), patience=2), ft.repeat(plain, 2)
    stacked = [ft.tree.stack(net_batches(2))] * 2
    (state, metrics), (expected, _) = (run(one, one.init(net_params()), stacked)[-1] for one in (step, reference))
    same_bits("params", state.params, expected.params)
    assert state.opt.scale == 2.0**16
    assert metrics["skipped"].shape == ()


def test_compiled_it_is_the_same_step():
    # With an average inside, and precision mixed: one graph of all three.
    def loss(params, batch):
        return torch.tanh(batch * params).sum(1)

    plain = ft.step(ft.grad(ft.mixed(loss, "compute=float16")), ft.optim.sgd(0.1))
    step = ft.loss_scaled(ft.averaged(plain, None, start=3, every=2), initial=2.0**10, patience=2)
    batches = [random_tree((4, 2), place) for place in range(6)]
    # Not by the scale: what inductor fuses is not rounded to float16 in between, and overflows less often.
    batches[3][0] = torch.nan
    expected = run(step, step.init(torch.tensor(0.3)), batches)
    assert [metrics["skipped"].item() for _, metrics in expected] == [0, 0, 0, 1, 0, 0]
    compiled = ft.compiled(step)
    state = compiled.init(torch.tensor(0.3))
    for batch, (want, measured) in zip(batches, expected):
        state, metrics = compiled(state, batch)
        equal("compiled", (state, metrics), (want, measured), 2e-3)
        equal("average", ft.average(state), ft.average(want), 2e-3)


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial", 0.5),
        ("initial", 1e39),
        ("initial", float("nan")),
        ("factor", 1.0),
        ("factor", float("inf")),
        ("patience", 0),
        ("patience", 2.5),
        ("least", 0.0),
        ("least", True),
    ],
)
def test_numbers_out_of_range(name, value):
    with pytest.raises(ft.ArgumentError, match=f"loss_scaled: {name} must be"):
        scaled(**{name: value})


def test_what_is_refused():
    plain = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    with pytest.raises(ft.ArgumentError, match=r"takes a step.*ft\.loss_scaled\(ft\.step"):
        ft.loss_scaled(ft.grad(net_loss))
    with pytest.raises(ft.ArgumentError, match="donate outside"):
        ft.loss_scaled(ft.compiled(plain))
    with pytest.raises(ft.ArgumentError, match=r"compile outside, ft\.compiled\(ft\.loss_scaled"):
        ft.loss_scaled(ft.guard(ft.compiled(plain, donate=False)))
    with pytest.raises(ft.ArgumentError, match=r"population\) is not made of one"):
        ft.loss_scaled(ft.population(plain))
    state = scaled(net_loss).init(net_params())
    with pytest.raises(ft.TreeError, match=r"ft\.population\(ft\.loss_scaled"):
        scaled(net_loss)(ft.tree.stack([state, state]), net_batch(4))
    with pytest.raises(ft.TreeError, match=r"opt is Scaled; this one's is SgdState"):
        scaled(net_loss)(plain.init(net_params()), net_batch(4))
    with pytest.raises(ft.TreeError, match=r"'hidden.b', 'hidden.w', 'out.0' … are float16.*ft\.mixed"):
        scaled(net_loss).init(net_params(0, torch.float16))

    class Own:
        uses, lanes, reduce = frozenset(), False, ft.reduce.mean

        def __call__(self, params, batch, **_):
            return ft.Gradient(params, torch.tensor(0.0), torch.tensor(1.0))

        finished = __call__

    with pytest.raises(ft.ArgumentError, match=r"Own is not made of ft.grad.loss., it has no attribute `grad`"):
        ft.loss_scaled(ft.step(Own(), ft.optim.sgd(0.1)))
    with pytest.raises(ft.LossError, match="0-d"):
        scaled(lambda params, batch: batch.mean() * params)(scaled().init(torch.tensor(0.0)), torch.ones(2))


def test_explain_says_how_the_scale_adapts():
    told = str(ft.explain(scaled(patience=7)))
    assert "32768 at first, times 2 after 7 good steps" in told
