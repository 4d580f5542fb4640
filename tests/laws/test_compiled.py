"""Law 10: compiled is the same step, donated is the same step; a donated state used again is an error."""

from __future__ import annotations

import itertools

import pytest
import torch
from instances import OPTIMIZERS, carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params
from torch import nn

import functrain as ft
from functrain.engine.graph import traced
from functrain.testing import check_step, equal, same_bits


def run(step, state, batches):
    rows = []
    for batch in batches:
        state, metrics = step(state, batch)
        # What is kept is a copy: a donating step empties the state it is given.
        rows.append(ft.tree.map(torch.clone, (state, metrics)))
    return rows


def batches(sizes, dtype=torch.float32):
    return [net_batch(size, place, dtype) for place, size in enumerate(sizes)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_donated_is_the_same_step(name):
    pure, donated = (ft.step(ft.grad(keyed_loss), OPTIMIZERS[name](0.01), donate=donate) for donate in (False, True))
    rows = [run(step, step.init(net_params(), seed=3), batches([4, 3, 5] * 7)) for step in (pure, donated)]
    same_bits(name, rows[1], rows[0])


@pytest.mark.parametrize("name", ["sgd nesterov", "adamw"])
def test_compiled_is_the_same_step(name):
    step = ft.step(ft.grad(net_loss), OPTIMIZERS[name](ft.optim.cosine(0.02, 30)))
    # Twenty steps, the last of an epoch ragged.
    given = batches([4, 4, 4, 4, 3] * 4)
    expected = run(step, step.init(net_params()), given)
    donated, pure = ft.compiled(step), ft.compiled(step, donate=False)
    equal("donated", run(donated, step.init(net_params()), given), expected)
    equal("pure", run(pure, step.init(net_params()), given[:4]), expected[:4])
    assert "2 shapes" in ft.explain(donated).facts["traced for"]
    check_step(donated, net_params(), given[:2])
    check_step(pure, net_params(), given[:2])


def test_a_schedule_and_other_hyperparameters_do_not_trace_again():
    traced = []

    def loss(params, batch):
        traced.append(1)
        return net_loss(params, batch)

    step = ft.compiled(ft.step(ft.grad(loss), ft.optim.sgd(ft.optim.warmup(3, ft.optim.cosine(0.1, 9)))))
    state = step.init(net_params())
    state, _ = step(state, net_batch(4))
    once = len(traced)
    for place in range(12):
        state, metrics = step(ft.with_hyper(state, lr_peak=0.1 / (1 + place)), net_batch(4, place))
    assert len(traced) == once
    equal("lr", metrics["lr"], torch.tensor(0.0, dtype=torch.float64))


def test_dropout_has_the_same_bits_compiled():
    def loss(params, batch, *, key):
        return ft.random.dropout(batch, 0.5, key) @ params["w"]

    step = ft.step(ft.grad(loss), ft.optim.sgd(0.5))
    params, batch = {"w": torch.zeros(8)}, torch.ones(4, 8)
    expected = run(step, step.init(params, seed=7), [batch] * 3)
    same_bits("masks", run(ft.compiled(step), step.init(params, seed=7), [batch] * 3), expected)


def test_batch_norm_is_the_same_compiled_and_its_buffers_stay_in_place():
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)))

    def loss(params, batch, *, carry):
        y, carry = apply(params, batch["x"], carry=carry)
        return y.square().sum(1), carry

    step = ft.step(ft.grad(loss), ft.optim.sgd(0.1))
    given = batches([5] * 4)
    expected = run(step, step.init(params, carry=apply.buffers), given)
    donated = ft.compiled(step)
    state = step.init(params, carry=apply.buffers)
    equal("batch norm", run(donated, state, given[:3])[-1], expected[2])
    state = donated(ft.tree.map(torch.clone, expected[2][0]), given[3])[0]
    equal("the last", state, expected[3][0])
    state = step.init(params, carry=apply.buffers)
    places = [leaf.data_ptr() for leaf in ft.tree.leaves(state)]
    new, _ = donated(state, given[0])
    assert [leaf.data_ptr() for leaf in ft.tree.leaves(new)] == places


# --- donation ----------------------------------------------------------------------------------------------------


def donating(kind, loss=net_loss, optimizer=None):
    optimizer = optimizer or ft.optim.adam(0.01)
    if kind == "eager":
        return ft.step(ft.grad(loss), optimizer, donate=True)
    return ft.compiled(ft.step(ft.grad(loss), optimizer, donate=kind == "compiled donating"))


KINDS = ["eager", "compiled", "compiled donating"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_donated_state_is_empty_and_an_error_to_use(kind):
    step = donating(kind)
    state = step.init(net_params())
    new, metrics = step(state, net_batch(3))
    for path, leaf in ft.tree.named((state.params, state.opt[:3], state.position)).items():
        assert leaf.shape == (0,), path
    pure = ft.step(ft.grad(net_loss), ft.optim.adam(0.01))
    for user in (step, pure, ft.population(pure)):
        with pytest.raises(ft.DonatedError, match="donate=False"):
            user(state, net_batch(3))
    kept = ft.tree.map(torch.clone, (new, metrics))
    step(new, net_batch(3))
    same_bits("metrics are not part of the state", metrics, kept[1])


@pytest.mark.parametrize("kind", KINDS)
def test_donating_a_state_leaves_those_before_it_alone(kind):
    pure, step = ft.step(ft.grad(keyed_loss), ft.optim.adam(0.01)), donating("eager", keyed_loss)
    if kind != "eager":
        step = donating(kind, net_loss)
        pure = ft.step(ft.grad(net_loss), ft.optim.adam(0.01))
    first = pure.init(net_params())
    expected = ft.tree.map(torch.clone, pure(first, net_batch(3)))
    second, _ = pure(first, net_batch(3))
    step(second, net_batch(3))
    same_bits("the state before", pure(first, net_batch(3)), expected)


def traps():
    """Losses whose new carry is old params, other places of the carry, copies of them, or of another shape."""

    def loss(params, batch, *, carry):
        w = params["w"]
        new = {
            "old": w,
            "copy": w.clone(),
            "turned": w.unsqueeze(0).t().clone().squeeze(1),
            "a": carry["b"],
            "b": carry["a"],
            "older": carry["old"],
            "kept": carry["kept"],
            "twice": carry["a"] * 2,
            "same": torch.cat([carry["twice"]]),
            "size": batch.sum() * torch.ones_like(batch),
        }
        return ft.Losses((w.sum() - batch).square() + carry["a"].sum(), aux={"batch": batch}, carry=new)

    names = ["old", "copy", "turned", "a", "b", "older", "kept", "twice", "same"]
    carry = {name: torch.full((2,), float(place + 1)) for place, name in enumerate(names)}
    return loss, carry | {"size": torch.zeros(3)}


@pytest.mark.parametrize("kind", KINDS)
def test_carries_that_share_memory_are_those_of_the_pure_step(kind):
    loss, carry = traps()
    params = {"w": torch.tensor([0.5, -0.5])}
    given = [torch.full((size,), float(place)) for place, size in enumerate([3, 3, 1, 3, 3])]
    pure = ft.step(ft.grad(loss), ft.optim.adam(0.1))
    expected = run(pure, pure.init(params, carry=carry), given)
    # By hand: what was the params of the step before, and the two places that change theirs.
    for (before, _), (after, _) in itertools.pairwise(expected):
        same_bits("old", (after.carry["old"], after.carry["copy"], after.carry["turned"]), (before.params["w"],) * 3)
        same_bits("swapped", (after.carry["a"], after.carry["b"]), (before.carry["b"], before.carry["a"]))
    step = donating(kind, loss, ft.optim.adam(0.1))
    equal(kind, run(step, step.init(params, carry=carry), given), expected)


def test_an_integer_carry_keeps_its_dtype_compiled():
    step = ft.step(ft.grad(carried_loss), ft.optim.sgd(0.1))
    expected = run(step, step.init(net_params(), carry=carried_start()), batches([3, 3]))
    equal("count", run(ft.compiled(step), step.init(net_params(), carry=carried_start()), batches([3, 3])), expected)


def test_batches_of_any_layout_are_the_same_batch():
    step = ft.step(ft.grad(lambda p, b: (b.reshape(-1, 2) @ p["w"]).square()), ft.optim.sgd(0.01))
    wide = torch.arange(48.0).reshape(4, 12)
    fast = ft.compiled(step, donate=False)
    state = step.init({"w": torch.ones(2)})
    for batch in (wide[:, ::2], wide[:, 0:1].expand(4, 6), wide.t()[:8]):
        equal("strides", fast(state, batch), step(state, batch))


def test_repeat_compiles_to_one_graph():
    step = ft.repeat(ft.step(ft.grad(net_loss), ft.optim.sgd(0.05)), 2)
    stacks = [ft.tree.stack(batches([3, 3])) for _ in range(2)]
    expected = run(step, step.init(net_params()), stacks)
    equal("repeat", run(ft.compiled(step), step.init(net_params()), stacks), expected)


def test_parts_compile_in_every_plan():
    given = batches([4, 4])
    for how in ("loop", "threads"):
        step = ft.step(ft.parallel(ft.grad(net_loss), 2, how=how, workers=2), ft.optim.sgd(0.05))
        expected = run(step, step.init(net_params()), given)
        equal(how, run(ft.compiled(step), step.init(net_params()), given), expected)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_without_a_compiler_the_step_runs_as_it_is(donate, tmp_path, monkeypatch):
    import torch._inductor.config

    # An empty cache, so that nothing compiled earlier is found.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = ft.step(ft.grad(net_loss), ft.optim.adam(0.01))
    step = ft.compiled(plain, donate=donate)
    state = step.init(net_params(6))
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}),
        pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler .*runs uncompiled"),
    ):
        new, metrics = step(state, net_batch(7))
    same_bits("uncompiled", (new, metrics), plain(plain.init(net_params(6)), net_batch(7)))
    assert "eager" in ft.explain(step).facts["runs as"]
    if donate:
        with pytest.raises(ft.DonatedError):
            step(state, net_batch(7))
    step(new, net_batch(7))


def test_what_is_no_graph_and_no_step():
    def branching(params, batch):
        return batch * params["w"] if params["w"] > 0 else batch

    def reading(params, batch):
        return batch * params["w"] * batch.sum().item()

    for loss in (branching, reading):
        step = ft.compiled(ft.step(ft.grad(loss), ft.optim.sgd(0.1)))
        with pytest.raises(ft.FunctrainError, match=r"reads the value of a tensor .*torch\.where"):
            step(step.init({"w": torch.tensor(1.0)}), torch.ones(3))
    with pytest.raises(ft.ArgumentError, match=r"takes a step, got .*ft\.step\(grad, optimizer\)"):
        ft.compiled(ft.grad(net_loss))


def test_a_step_that_changes_the_structure_of_its_state_is_refused():
    def growing(params, batch, *, carry):
        return batch * params["w"], carry | {f"n{len(carry)}": batch.sum()}

    step = ft.compiled(ft.step(ft.grad(growing), ft.optim.sgd(0.1)))
    with pytest.raises(ft.FunctrainError, match=r"structure of its state.*'carry.n1'"):
        step(step.init({"w": torch.tensor(1.0)}, carry={"n0": torch.tensor(0.0)}), torch.ones(3))


@pytest.mark.parametrize("leaves", [1, 5])
def test_what_all_leaves_share_is_in_the_graph_once(leaves):
    optimizer = ft.optim.adamw(1e-3)
    params = {str(n): torch.ones(3) for n in range(leaves)}
    flat, spec = ft.tree.flatten((params, optimizer.init(params), params))
    graph = traced(lambda *given: ft.tree.leaves(optimizer.update(*ft.tree.unflatten(spec, given))), flat)
    counted = [node.target for node in graph.graph.nodes]
    # β₁ᵗ and β₂ᵗ, and the vector that inductor stores them in.
    assert counted.count(torch.ops.aten.pow.Tensor_Tensor) == 2
    assert counted.count(torch.ops.aten.as_strided.default) == 1
