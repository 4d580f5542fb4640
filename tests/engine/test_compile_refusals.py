"""What a compiled step does with what cannot be, or need not be, one graph."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import functrain as ft
from functrain.engine.graph import hands_on, traced

VALUES = torch.tensor([1.0, 2.0])


def square(params, batch):
    return (batch * params["w"]) ** 2


def sgd(loss=square, **options) -> ft.Step:
    return ft.step(ft.grad(loss), ft.optim.sgd(0.1), **options)


def start(step: ft.Step | None = None) -> ft.State:
    return (step or sgd()).init({"w": torch.tensor(0.5)})


def losses(step: ft.Step, steps: int = 3) -> list[float]:
    state, found = start(step), []
    for _ in range(steps):
        state, metrics = step(state, VALUES)
        found.append(float(metrics["loss"]))
    assert int(state.position) == steps
    return found


@pytest.mark.parametrize(
    "around",
    [
        lambda: ft.compiled(ft.compiled(sgd())),
        lambda: ft.compiled(ft.compiled(sgd()), donate=False),
        lambda: ft.compiled(sgd(donate=True)),
    ],
)
def test_compiling_what_is_compiled_is_the_same_step(around):
    assert losses(around()) == pytest.approx(losses(sgd()))


def test_repeating_a_compiled_step_compiled_is_the_same_step():
    twice = ft.compiled(ft.repeat(ft.compiled(sgd()), 2))
    state, metrics = twice(start(), torch.stack([VALUES, VALUES]))
    assert metrics["loss"].tolist() == pytest.approx(losses(sgd(), 2))
    assert int(state.position) == 2


def test_a_population_of_a_compiled_step_runs_as_a_population():
    many = ft.population(ft.compiled(sgd(), donate=False))
    state, metrics = many(many.init([start(), ft.with_hyper(start(), lr=0.2)]), VALUES)
    assert metrics["loss"].tolist() == pytest.approx([0.625, 0.625])
    assert state.params["w"].tolist() == pytest.approx([0.25, 0.0])


@pytest.mark.parametrize(
    "reads",
    [
        lambda n: max(n.tolist()),
        lambda n: float(n.numpy().max()),
        lambda n: 1.0 if n.sum() > 2 else 2.0,
        lambda n: n.max().item(),
        lambda n: int(n[0]),
    ],
)
def test_a_loss_that_reads_values_is_refused_and_not_frozen(reads):
    step = ft.compiled(sgd(lambda params, batch: (batch["x"] * params["w"] * reads(batch["n"])) ** 2))
    with pytest.raises(ft.FunctrainError, match="not one graph"):
        step(start(), {"x": VALUES, "n": torch.tensor([1, 1])})


def test_a_boolean_mask_in_a_loss_is_refused_with_advice():
    step = ft.compiled(sgd(lambda params, batch: square(params, batch)[batch > 1]))
    with pytest.raises(ft.FunctrainError, match="weights"):
        step(start(), VALUES)


def test_members_taken_out_of_a_population_stay_as_they_were():
    many = ft.compiled(ft.population(sgd()))
    state = many.init([start(), ft.with_hyper(start(), lr=0.5)])
    member = ft.tree.unstack(state)[1]
    many(state, VALUES)
    assert float(member.params["w"]) == 0.5
    assert int(member.position) == 0


def test_lazily_negated_batches_have_their_own_values():
    step = ft.compiled(sgd(lambda params, batch: batch * params["w"]), donate=False)
    _, plain = step(start(), VALUES)
    _, negated = step(start(), torch._neg_view(VALUES))
    assert float(negated["loss"]) == -float(plain["loss"])


@pytest.mark.parametrize("batch", [np.ones(2), 1.0])
def test_a_batch_that_is_no_tensor_is_named(batch):
    with pytest.raises(ft.TreeError, match="trees of tensors, got a leaf that is"):
        ft.compiled(sgd())(start(), batch)


def test_an_lstm_compiles_and_is_the_same_step():
    params, apply = ft.functional(nn.LSTM(1, 3, batch_first=True))
    step = ft.step(ft.grad(lambda params, x: apply(params, x)[0].sum(-1)), ft.optim.sgd(0.1))
    x = ft.random.normal(ft.random.key(0), (4, 3, 1))
    plain, _ = step(step.init(params), x)
    compiled = ft.compiled(step)
    once, _ = compiled(compiled.init(params), x)
    for name, value in plain.params.items():
        torch.testing.assert_close(once.params[name], value, rtol=1e-5, atol=1e-6)


def test_threads_may_compile_at_once():
    step, found, failed = ft.compiled(sgd(), donate=False), [], []

    def work(size: int) -> None:
        try:
            found.append(float(step(start(), torch.ones(size))[1]["loss"]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(2 + number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert found == [0.25] * 4


@pytest.mark.parametrize("where", ["state", "batch"])
def test_a_derivative_through_a_compiled_step_is_refused(where):
    step = ft.compiled(ft.step(ft.grad(lambda p, b: (p - b) ** 2), ft.optim.sgd(0.1)), donate=False)
    state, batch = step.init(torch.tensor(0.0)), torch.ones(3)
    if where == "batch":
        batch.requires_grad_()
    else:
        state = state._replace(params=torch.tensor(0.0, requires_grad=True))
    with pytest.raises(ft.ArgumentError, match="no derivative flows through a compiled step"):
        step(state, batch)


# --- what a graph must not take for granted --------------------------------------------------------------------------


def compiled_and_plain(loss, **options):
    step = ft.step(ft.grad(loss), ft.optim.sgd(0.1))
    return ft.compiled(step, **options), step


def test_a_batch_that_holds_a_tensor_twice_says_nothing_of_the_next():
    compiled, plain = compiled_and_plain(lambda p, b: (b["x"] * p["w"] - b["y"]) ** 2)
    params, x, y = {"w": torch.tensor(0.5)}, torch.arange(4.0), torch.ones(4) * 5
    for batch in ({"x": x, "y": x}, {"x": x, "y": y}):
        got, expected = (step(step.init(params), batch)[0].params for step in (compiled, plain))
        ft.testing.equal("two tensors", got, expected)


def test_a_batch_in_the_memory_of_the_state_is_read_before_that_is_written():
    compiled, plain = compiled_and_plain(lambda p, b: (b * p["w"] - 1) ** 2)
    params, other = {"w": torch.arange(4.0)}, torch.ones(4)
    for make in (lambda state: state.params["w"], lambda state: state.params["w"].view(4), lambda state: other):
        results = []
        for step in (compiled, plain):
            state, _ = step(step.init(params), other)
            results.append(step(state, make(state))[0].params)
        ft.testing.equal("the same step", *results)


@pytest.mark.parametrize("change", ["transposed", "another tensor", "another shape"])
def test_a_leaf_that_was_changed_in_place_is_looked_at_again(change):
    compiled, plain = compiled_and_plain(lambda p, b: ((b @ p["w"]) ** 2).mean(1))
    params, batch = {"w": torch.arange(16.0).reshape(4, 4) / 100}, torch.arange(12.0).reshape(3, 4)
    results = []
    for step in (compiled, plain):
        state, _ = step(step.init(params), batch)
        state, _ = step(state, batch)
        if change == "transposed":
            state.params["w"].t_()
        else:
            state.params["w"].data = torch.zeros(4, 2) if change == "another shape" else params["w"].t().contiguous().t()
        results.append(step(state, batch)[0].params)
    ft.testing.equal(change, *results)


@pytest.mark.parametrize(
    "moved",
    [
        lambda w: torch.stack([w])[0],
        lambda w: w.repeat(1),
        lambda w: w.unbind(0)[2],
        lambda w: w.split(2)[1],
        lambda w: torch.zeros(4, 4).copy_(w),
        lambda w: torch.slice_scatter(torch.zeros(4), w),
        lambda w: w.view(torch.int32),
    ],
)
def test_a_carry_of_the_old_params_is_never_that_of_the_new(moved):
    def loss(params, batch, *, carry):
        return (batch - params["w"]) ** 2, {"old": moved(params["w"].detach())}

    w, step = torch.arange(4.0), ft.step(ft.grad(loss), ft.optim.sgd(0.25))
    flat, spec = ft.tree.flatten((step.init({"w": w}, carry={"old": moved(w)}), torch.ones(3, 4)))
    size = len(flat) - 1

    def written(*leaves):
        state, metrics = step.update(*ft.tree.unflatten(spec, leaves))
        new = ft.tree.leaves(state)
        leaves[0].copy_(new[0])
        return (*new[1:], *ft.tree.leaves(metrics))

    assert hands_on(traced(written, flat), size)


def test_threads_may_share_a_compiled_step_whose_batches_differ():
    step = ft.compiled(ft.step(ft.grad(lambda p, b: ((b @ p["w"]) ** 2).mean(1)), ft.optim.sgd(0.01)))
    finals: dict[int, torch.Tensor] = {}

    def work(rows: int, size: int) -> None:
        state, batch = step.init({"w": torch.eye(size)}), torch.ones(rows, size)
        for _ in range(3000):
            state, _ = step(state, batch)
        finals[size] = state.params["w"]

    threads = [threading.Thread(target=work, args=given) for given in ((4, 8), (5, 16))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size, rows in ((8, 4), (16, 5)):
        alone, batch = step.init({"w": torch.eye(size)}), torch.ones(rows, size)
        for _ in range(3000):
            alone, _ = step(alone, batch)
        ft.testing.same_bits("alone", finals[size], alone.params["w"])


def test_autocast_is_that_of_the_call_not_of_the_trace():
    torch.manual_seed(0)
    compiled, plain = compiled_and_plain(lambda p, b: (b @ p["w"]).float().square().mean(1), donate=False)
    params, batch = {"w": torch.randn(8, 8)}, torch.randn(4, 8)
    losses = {}
    for cast in (True, False, True):
        for name, step in (("compiled", compiled), ("plain", plain)):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                losses[name, cast] = step(step.init(params), batch)[1]["loss"]
        ft.testing.equal(f"{cast}", losses["compiled", cast], losses["plain", cast], 1e-5)
    assert losses["plain", True] != losses["plain", False]
