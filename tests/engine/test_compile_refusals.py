"""What a compiled step does with what cannot be, or need not be, one graph."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import functrain as ft

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
