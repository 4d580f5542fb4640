"""Mixed precision: what a loss is given and gives, in which dtype it is summed, and where it can go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from instances import (
    PLANS,
    REDUCERS,
    keyed_loss,
    net_batch,
    net_loss,
    net_params,
    random_tree,
    recurrent,
)
from torch import nn
from wrapped_steps import check_members, net_batches, run

import functrain as ft
from functrain.testing import equal, same_bits

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
HALVES = [torch.bfloat16, torch.float16]


# --- the policy -------------------------------------------------------------------------------------------------------


@given(DTYPES, DTYPES, DTYPES)
def test_a_policy_is_its_text(params, compute, output):
    policy = ft.Precision(params, compute, output)
    assert ft.Precision.of(str(policy)) == policy == ft.Precision.of(policy)
    tree = {"w": torch.ones(2), "half": torch.ones(1).half(), "n": torch.tensor(1), "b": torch.tensor(True), "none": None}
    for cast, dtype in ((policy.cast_params, params), (policy.cast_compute, compute), (policy.cast_output, output)):
        got = cast(tree)
        assert [leaf.dtype for leaf in ft.tree.leaves(got)] == [torch.bool, dtype, torch.int64, dtype]


def test_what_is_left_out_of_a_text_is_as_by_default():
    assert ft.Precision.of(" compute = float16 ") == ft.Precision(compute=torch.float16)
    assert str(ft.Precision()) == "params=float32,compute=bfloat16,output=float32"


@pytest.mark.parametrize(
    "wrong", ["", "float16", "compute=half", "compute=int8", "compute=float16,compute=float16", "all=float16", 16]
)
def test_a_policy_has_to_be_one(wrong):
    with pytest.raises(ft.ArgumentError, match=r"expected text such as 'params=float32"):
        ft.Precision.of(wrong)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float16"])
def test_a_policy_is_of_floating_dtypes(dtype):
    with pytest.raises(ft.ArgumentError, match=r"compute must be one of torch\.float16"):
        ft.Precision(compute=dtype)


# --- what a loss sees and gives -----------------------------------------------------------------------------------------


def test_a_loss_is_given_what_it_computes_with_and_keeps_the_rest():
    seen = {}

    def loss(params, batch, *, carry, key):
        seen.update(params=params, batch=batch, carry=carry, key=key)
        values = (batch["x"] * params["w"]).sum(1)
        right = values > 0
        return ft.Losses(
            values, batch["weight"], {"right": right, "size": values.abs()}, {"mean": values.mean(), "n": carry["n"]}
        )

    batch = {"x": torch.ones(3, 2, dtype=torch.float64), "y": torch.arange(3), "weight": torch.tensor([1.0, 257.0, 1.0])}
    carry = {"mean": torch.tensor(0.0), "n": torch.tensor(5)}
    half = ft.mixed(loss, keep=("weight",))
    taken = ft.grad(half).finished({"w": torch.ones(2)}, batch, carry=carry, key=ft.random.key(0))
    dtypes = {name: leaf.dtype for name, leaf in ft.named_params(seen).items()}
    assert dtypes == {
        "params.w": torch.bfloat16,
        "batch.x": torch.bfloat16,
        "batch.y": torch.int64,
        "batch.weight": torch.float32,
        "carry.mean": torch.float32,
        "carry.n": torch.int64,
        "key": torch.int64,
    }
    assert {leaf.dtype for leaf in ft.tree.leaves((taken.grads, taken.loss, taken.aux, taken.carry["mean"]))} == {torch.float32}
    # bfloat16 would have made 256 of it.
    assert taken.weight == 259
    assert batch["x"].dtype == torch.float64


def test_keep_names_entries_of_the_batch():
    with pytest.raises(ft.TreeError, match=r"keep='weights' .*expected one of .*'weight'"):
        ft.grad(ft.mixed(net_loss, keep="weights"))(net_params(), net_batch(3))
    with pytest.raises(ft.ArgumentError, match="names an entry"):
        ft.mixed(net_loss, keep=3)


def test_broken_losses_are_refused_as_ever():
    for broken in (lambda p, b: (b["x"] * p["scale"]).mean(), lambda p, b: 1.0, lambda p, b: b["x"][:, 0] > 0):
        with pytest.raises(ft.LossError, match=r"per-example losses|0-d"):
            ft.grad(ft.mixed(broken))(net_params(), net_batch(3))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_recurrent_state_begins_in_the_dtype_that_is_computed_in(dtype):
    params, loss, start = recurrent()
    half = ft.mixed(loss, ft.Precision(compute=dtype))
    batch = random_tree({"x": (3, 6, 3), "y": (3, 6, 2)}, 0)
    grad = ft.tbptt(ft.grad(half), 2, lambda batch: tuple(leaf.to(dtype) for leaf in start(batch)))
    expected = ft.tbptt(ft.grad(loss), 2, start).finished(params, batch)
    got = grad.finished(params, batch)
    equal("windows", (got.grads, got.loss), (expected.grads, expected.loss), 0.05)
    with pytest.raises(RuntimeError) as refused:
        ft.tbptt(ft.grad(half), 2, start)(params, batch)
    assert "begin a recurrent state in the policy's compute dtype" in "".join(refused.value.__notes__)


# --- sums are not taken in half precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", PLANS)
def test_no_sum_or_mean_is_taken_in_half_precision(how):
    # bfloat16 makes 256 of 257; 257 losses of 300 do not fit float16.
    for dtype, value in ((torch.bfloat16, 1.0), (torch.float16, 300.0)):
        batch = torch.full((257,), value, dtype=dtype)
        grad = ft.parallel(ft.grad(lambda p, b: ft.Losses(b * p, aux={"same": b * p})), 2, how=how)
        taken = grad.finished(torch.tensor(1.0, dtype=dtype), batch)
        assert taken.loss == taken.aux["same"] == value
        assert taken.loss.dtype == torch.float32
        # Gradients are as precise as the params are: where parts' sums are merged, 256 / 257.
        assert dtype == torch.float16 or abs(taken.grads - 1) <= 2**-8


def test_the_mean_divides_by_weights_that_half_precision_does_not_know():
    total = ft.Gradient({"w": torch.tensor([257.0, 514.0])}, torch.tensor(257.0), torch.tensor(257.0, dtype=torch.float64))
    half = total._replace(grads={"w": torch.tensor([256.0, 512.0]).bfloat16()})
    same_bits("bfloat16", ft.reduce.mean.finish(half).grads["w"], (torch.tensor([256.0, 512.0]) / 257).bfloat16())
    many = total._replace(grads={"w": torch.tensor([60000.0]).half()}, weight=torch.tensor(120000.0, dtype=torch.float64))
    assert ft.reduce.mean.finish(many).grads["w"] == 0.5


# --- where it can go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", PLANS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_plan_has_the_same_result(how, dtype):
    half = ft.mixed(keyed_loss, ft.Precision(compute=dtype), keep="weight")
    given = net_params(), net_batch(7)
    key = ft.random.key(3)
    expected = ft.grad(keyed_loss).finished(*given, key=key)
    got = ft.parallel(ft.grad(half), 3, how=how, workers=2).finished(*given, key=key)
    equal(how, (got.grads, got.loss), (expected.grads, expected.loss), 0.03)
    assert got.weight == expected.weight


@pytest.mark.parametrize("name", ["median", "clip_per_example(1)", "private(1, 0.5)"])
def test_reducers_that_see_parts_or_examples(name):
    given = net_params(), net_batch(6)
    key = ft.random.key(3)
    grads = [ft.parallel(ft.grad(loss), 3, REDUCERS[name]) for loss in (net_loss, ft.mixed(net_loss, keep="weight"))]
    expected, got = (grad.finished(*given, key=key if "key" in grad.uses else None) for grad in grads)
    equal(name, got.grads, expected.grads, 0.03)


@pytest.mark.parametrize("how", ["vmap", "threads", "loop"])
@pytest.mark.parametrize("dtype", HALVES)
def test_batch_norm_keeps_its_statistics(how, dtype):
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))

    def loss(params, batch, *, carry):
        scores, carry = apply(params, batch["x"], carry=carry)
        return (scores - batch["targets"][0]).square().sum(1), carry

    def judged(params, batch):
        return (apply.eval()(params, batch["x"]) - batch["targets"][0]).square().sum(1)

    ends = []
    for one in (loss, ft.mixed(loss, ft.Precision(compute=dtype))):
        step = ft.step(ft.parallel(ft.grad(one), 2, how=how, workers=2), ft.optim.sgd(0.05))
        ends.append(run(step, step.init(params, carry=apply.buffers), net_batches(10, 8))[-1])
    (full, _), (half, metrics) = ends
    for (name, leaf), before in zip(half.carry.items(), full.carry.values()):
        assert leaf.dtype == before.dtype, name
    equal("statistics", half.carry, full.carry, 0.05)
    assert metrics["loss"].dtype == torch.float32
    # More than 8 bits: what is added in float32 is not rounded to what it was computed in.
    assert not torch.equal(half.carry["1.running_var"], half.carry["1.running_var"].to(dtype).float())
    # In evaluation, too, where the statistics are closed over.
    found = [
        ft.evaluate(one, params, net_batches(2))["loss"] for one in (judged, ft.mixed(judged, ft.Precision(compute=dtype)))
    ]
    assert abs(found[0] - found[1]) < 0.03 * found[0]


def test_it_is_remade_evaluated_vmapped_and_wrapped_like_the_loss():
    half = ft.mixed(keyed_loss, keep="weight")
    given = net_params(), net_batches(3)
    found, expected = (ft.evaluate(loss, *given, seed=1)["loss"] for loss in (half, keyed_loss))
    assert abs(found - expected) < 0.02 * expected
    check_members(ft.step(ft.grad(half), ft.optim.adam(0.01)), net_batches(3))
    over_time = ft.seqloss(ft.mixed(lambda params, x: (x - params) ** 2))
    taken = ft.grad(over_time).finished(torch.tensor(1.0), torch.tensor([[1.0, 2.0, 3.0]]))
    equal("over time", (taken.loss, taken.grads), (torch.tensor(5 / 3), torch.tensor(-2.0)), 2**-8)
    block = ft.remat(lambda w, x: torch.tanh(x @ w))
    kept, again = (
        ft.grad(ft.mixed(lambda p, b, f=f: f(p["hidden"]["w"], b["x"]).square().sum(1)))(*given[:1], net_batch(5))
        for f in (lambda w, x: torch.tanh(x @ w), block)
    )
    same_bits("rematerialised", again, kept)


def test_a_policy_in_which_nothing_is_cast_changes_nothing():
    same = ft.mixed(net_loss, "compute=float32")
    grads = [ft.grad(loss).finished(net_params(), net_batch(5)) for loss in (same, net_loss)]
    same_bits("float32", *grads)


def test_params_in_half_precision_train_and_come_back_in_it():
    policy = ft.Precision.of("params=bfloat16")
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Linear(3, 2))

    def loss(params, batch):
        return F.cross_entropy(apply(params, batch["x"]), batch["targets"][1].long().abs() % 2, reduction="none")

    step = ft.step(ft.grad(ft.mixed(loss, policy)), ft.optim.adam(0.01))
    rows = run(step, step.init(policy.cast_params(params)), [net_batch(16)] * 20)
    assert {leaf.dtype for leaf in ft.tree.leaves(rows[-1][0].params)} == {torch.bfloat16}
    assert rows[-1][1]["loss"] < rows[0][1]["loss"]


def test_explain_shows_the_policy():
    assert "mixed(function net_loss, params=float32,compute=bfloat16,output=float32)" in str(
        ft.explain(ft.grad(ft.mixed(net_loss)))
    )
