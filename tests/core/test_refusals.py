"""Inputs that once went through unnoticed: each is now an error that says what to do, or the right number."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import functrain as ft

W = {"w": torch.tensor(0.5)}


def sgd(loss) -> ft.Step:
    return ft.step(ft.grad(loss), ft.optim.sgd(0.1))


def square(params, batch):
    return (batch * params["w"]) ** 2


def test_losses_that_do_not_belong_to_the_examples_are_refused():
    step = sgd(lambda params, batch: params["w"] * torch.ones(7))
    with pytest.raises(ft.LossError, match=r"shape \(7,\) for a batch of N = 3"):
        step(step.init(W), torch.ones(3))


def test_losses_with_time_folded_in_are_fine():
    step = sgd(lambda params, batch: square(params, batch).flatten())
    _, metrics = step(step.init(W), torch.ones(3, 4))
    assert float(metrics["weight"]) == 12


def test_weights_that_sum_to_zero_are_refused():
    step = sgd(lambda params, batch: (square(params, batch), batch * 0))
    with pytest.raises(ft.LossError, match="sum to zero"):
        step(step.init(W), torch.ones(3))


def test_one_part_without_weight_is_fine():
    def loss(params, batch):
        return square(params, batch["x"]), batch["weight"]

    batch = {"x": torch.arange(4.0), "weight": torch.tensor([0.0, 0.0, 1.0, 2.0])}
    whole, parts = ft.grad(loss), ft.parallel(ft.grad(loss), 2, how="loop")
    torch.testing.assert_close(parts.finished(W, batch).grads, whole.finished(W, batch).grads)


def test_negative_weights_are_refused():
    step = sgd(lambda params, batch: (square(params, batch), -batch))
    with pytest.raises(ft.LossError, match="weights must not be negative, the smallest is -1"):
        step(step.init(W), torch.ones(3))


def test_an_aux_measure_called_loss_does_not_take_the_place_of_the_loss():
    def loss(params, batch):
        return ft.Losses(batch * 0 + 1.0, aux={"loss": batch * 0, "right": batch})

    expected = {"loss": 1.0, "aux.loss": 0.0, "right": 1.0}
    assert ft.evaluate(loss, W, ft.arrays(torch.ones(4)).batch(2)) == expected
    step = sgd(loss)
    _, metrics = step(step.init(W), torch.ones(4))
    assert {name: float(metrics[name]) for name in expected} == expected


def test_params_of_a_donated_state_say_so_where_they_are_used():
    loss = lambda params, batch: (batch @ params["w"]) ** 2  # noqa: E731
    step = ft.step(ft.grad(loss), ft.optim.adam(), donate=True)
    state = step.init({"w": torch.ones(2)})
    step(state, torch.ones(3, 2))
    with pytest.raises(ft.DonatedError, match="the state that the step returned"):
        ft.evaluate(loss, state.params, [torch.ones(3, 2)])


def recurrent(params, x, *, carry):
    hidden = carry + params * x.sum(1)
    return hidden**2, hidden


def zeros(x):
    return torch.zeros(len(x))


def test_cut_batches_inside_tbptt_need_lanes_of_carry():
    cut = ft.parallel(ft.grad(recurrent), 4)
    for inner in (cut, ft.step(cut, ft.optim.sgd(0.1)), ft.accumulate(ft.grad(recurrent), 2)):
        with pytest.raises(ft.LossError, match="lanes=True"):
            ft.tbptt(inner, 2, zeros)


@pytest.mark.parametrize("how", ["auto", "loop", "threads"])
def test_cut_batches_inside_tbptt_with_lanes_are_the_whole(how):
    x, params = ft.random.normal(ft.random.key(0), (5, 6)), torch.tensor(1.0)
    whole = ft.tbptt(ft.grad(recurrent), 2, zeros)(params, x)
    cut = ft.tbptt(ft.parallel(ft.grad(recurrent, lanes=True), 5, how=how, workers=2), 2, zeros)(params, x)
    torch.testing.assert_close(cut.grads, whole.grads)
    assert float(cut.weight) == float(whole.weight) == 15


def test_windows_of_padding_alone_are_told_to_be_summed():
    def padded(params, batch, *, carry):
        steps, mask = batch
        return ft.Losses((steps.sum(1) - params) ** 2, mask.sum(1).float(), None, carry)

    batch = torch.ones(2, 6), torch.arange(6).expand(2, 6) < 3
    optimizer, params = ft.optim.sgd(0.1), torch.tensor(1.0)
    step = ft.tbptt(ft.step(ft.grad(padded), optimizer), 2, lambda batch: torch.zeros(2))
    with pytest.raises(ft.LossError, match=r"sum to zero.*window 2 of tbptt.*ft\.step\(ft\.tbptt\(ft\.grad\(loss\)"):
        step(step.init(params), batch)
    summed = ft.step(ft.tbptt(ft.grad(padded), 2, lambda batch: torch.zeros(2)), optimizer)
    assert float(summed(summed.init(params), batch)[1]["weight"]) == 6


def test_a_start_with_layers_in_front_is_told_to_turn_around():
    gradient = ft.tbptt(ft.grad(recurrent), 2, lambda x: torch.zeros(1, len(x)))
    with pytest.raises(ft.TreeError, match="transpose"):
        gradient(torch.tensor(1.0), torch.ones(5, 6))


@pytest.mark.parametrize("how", ["auto", "loop", "threads", "vmap"])
def test_a_reducer_that_is_not_linear_inside_another_parallel_is_finished_first(how):
    def larger(a, b):
        return ft.tree.map(lambda x, y: torch.where(a.loss >= b.loss, x, y), a, b)

    worst = ft.Reducer("worst", merge=larger, finish=ft.reduce.mean.finish)
    inner = ft.parallel(ft.grad(lambda params, batch: (batch - params) ** 2), 2, worst)
    batch = torch.tensor([1.0, 5, 2, 9, 3, 4, 7, 1])
    found = ft.parallel(inner, 2, how=how).finished(torch.tensor(0.0), batch)
    # The worse quarter of each half: (2, 9) with gradient −11 and (7, 1) with gradient −8.
    assert float(found.grads) == -9.5


class Counter(nn.Module):
    """Binds its buffer anew at each call, or adds to it in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return x


@pytest.mark.parametrize("in_place", [True, False])
def test_a_module_that_changes_its_buffers_needs_a_carry(in_place):
    _, apply = ft.functional(Counter(in_place))
    with pytest.raises(ft.LossError, match="changes its buffers 'calls'"):
        apply({}, torch.ones(2))
    assert float(apply.buffers["calls"]) == 0
    _, carry = apply({}, torch.ones(2), carry=apply.buffers)
    assert float(carry["calls"]) == 1


@pytest.mark.parametrize("seed", [torch.tensor([1, 2]), torch.tensor(1.5)])
def test_a_seed_tensor_is_a_key(seed):
    with pytest.raises(ft.ArgumentError, match="a seed is an int, or a key"):
        sgd(square).init(W, seed=seed)


def test_states_that_belong_elsewhere_are_told_apart():
    step, many = sgd(square), ft.population(sgd(square))
    alone, stacked = step.init(W), many.init([step.init(W)] * 2)
    with pytest.raises(ft.TreeError, match="single state"):
        many(alone, torch.ones(2))
    with pytest.raises(ft.TreeError, match="state of a population"):
        step(stacked, torch.ones(2))
    with pytest.raises(ft.TreeError, match="unstack"):
        many.init([stacked])
    with pytest.raises(ft.ArgumentError, match="list of states"):
        many.init(W)
    with pytest.raises(ft.TreeError, match="dtypes"):
        many.init([step.init(W), step.init({"w": torch.tensor(0.5, dtype=torch.float64)})])
    adam = ft.step(ft.grad(square), ft.optim.adam()).init(W)
    with pytest.raises(ft.TreeError, match="SgdState"):
        step(adam, torch.ones(2))


def test_a_state_shows_itself_in_a_line():
    state = sgd(square).init({"a": torch.zeros(1000), "b": torch.zeros(3)})
    assert repr(state) == "<State at position 0: params 2 tensors, 1,003 numbers; opt SgdState; carry none>"


def test_an_experiment_without_batches_is_refused():
    empty = ft.arrays(torch.arange(3)).shard(5, 9)
    step = sgd(square)
    assert list(ft.fold(step, step.init(W), empty)) == []
    with pytest.raises(ft.ArgumentError, match="no batches"):
        ft.Experiment(step, W, empty, 1)


# --- optimizers that are none, and states that were given away ----------------------------------------------------------


class Pair(NamedTuple):
    init: Any
    update: Any


def squared(params, batch):
    return (params["w"] - batch).square().sum(1)


ONE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (ft.optim.clip_by_norm(1.0), "clip_by_norm changes gradients, and goes nowhere by itself"),
        (ft.optim.chain(ft.optim.clip(1.0), ft.optim.noise(0.1)), "chain changes gradients"),
        (ft.optim.masked(ft.optim.clip(1.0), "*"), "masked changes gradients"),
        (torch.optim.SGD, r"torch's SGD: write ft.optim.from_torch\(torch.optim.SGD"),
        (torch.optim.Adam([torch.ones(1)]), "torch's Adam"),
        ((lambda params: (), lambda grads, state, params: (grads, state)), "a tuple: give it names"),
    ],
)
def test_what_is_no_optimizer_is_told_apart(optimizer, told):
    with pytest.raises(ft.ArgumentError, match=told):
        ft.step(ft.grad(squared), optimizer)


@pytest.mark.parametrize(
    ("init", "update", "told"),
    [
        (lambda p: 0, lambda g, s, p: (g, s), "init returned has a leaf '' of type int"),
        (lambda p: (), lambda g, s, p: g, r"returned dict: expected \(updates, state\)"),
        (lambda p: (), lambda g, s, p: ({"v": g["w"]}, s), "structure of params: missing 'w'"),
        (lambda p: (), lambda g, s, p: ({"w": g["w"].sum()}, s), r"update of 'w' by Pair is \(\) of torch.float32"),
        (lambda p: (), lambda g, s, p: ({"w": g["w"].double()}, s), "is .* of torch.float64, the parameter"),
        (lambda p: (), lambda g, s, p: (g, 1.0), "that the update of Pair returned has a leaf"),
    ],
)
def test_a_pair_from_elsewhere_is_held_to_its_contract(init, update, told):
    step = ft.step(ft.grad(squared), Pair(init, update))
    with pytest.raises(ft.FunctrainError, match=told):
        step(step.init(ONE), torch.zeros(3, 2))


def test_a_state_that_was_given_away_is_not_saved(tmp_path):
    step = ft.step(ft.grad(squared), ft.optim.sgd(0.1), donate=True)
    state = step.init(ONE)
    step(state, torch.zeros(3, 2))
    with pytest.raises(ft.DonatedError):
        ft.save_tree(tmp_path / "state.safetensors", state)
    assert not list(tmp_path.iterdir())


def test_averages_of_averages_have_hyperparameters_of_their_own():
    step = ft.averaged(ft.averaged(ft.step(ft.grad(squared), ft.optim.sgd(0.1)), 0.9), 0.5)
    state = ft.with_hyper(step.init(ONE), **{"inner.decay": 0.25})
    found = {name: value.item() for name, value in ft.hyper(state).items()}
    assert found == {"decay": 0.5, "inner.decay": 0.25, "lr": 0.1}


def test_the_loss_of_a_step_is_scaled_once():
    with pytest.raises(ft.ArgumentError, match="scaled already"):
        ft.loss_scaled(ft.loss_scaled(ft.step(ft.grad(squared), ft.optim.sgd(0.1))))


@pytest.mark.parametrize("value", [True, None, "0.1", float("nan"), float("inf"), ft.optim.cosine(0.1, 10)])
def test_a_hyperparameter_is_replaced_by_numbers_alone(value):
    with pytest.raises(ft.ArgumentError, match="lr"):
        ft.with_hyper(ft.optim.sgd(0.1).init(ONE), lr=value)


def test_schedule_free_among_others_gives_the_average_of_its_share():
    groups = {"free": ft.optim.schedule_free(0.1), "plain": ft.optim.sgd(0.1)}
    both = ft.optim.partition(groups, {"w": "free", "b": "plain"})
    step = ft.step(ft.grad(lambda p, b: (p["w"] * p["b"] - b).square().sum(1)), both)
    state = step.init({"w": torch.ones(2), "b": torch.ones(2)})
    for _ in range(3):
        state, _ = step(state, torch.zeros(3, 2))
    free = state.opt.inner["free"]
    expected = ft.optim.schedule_free_params(free, {"w": state.params["w"]})["w"]
    assert not torch.equal(expected, state.params["w"])
    got = ft.optim.schedule_free_params(state, state.params)
    ft.testing.same_bits("its share, the others as they are", got, {"w": expected, "b": state.params["b"]})
