"""What `parallel` does with parts that fail, losses that break their contract, and arguments that make no sense."""

from __future__ import annotations

import contextvars
import threading
import traceback

import pytest
import torch
from instances import net_batch, net_loss, net_params
from torch.overrides import TorchFunctionMode

import functrain as ft
from functrain.testing import equal

HOWS = ("fused", "loop", "threads", "vmap")


@pytest.mark.parametrize("how", ["loop", "threads"])
def test_an_error_in_a_part_names_the_part_and_keeps_its_traceback(how):
    def loss(params, batch):
        if batch["x"][0, 0] == 99:
            raise KeyError("a file is gone")
        return net_loss(params, batch)

    batch = net_batch(12)
    batch["x"][6, 0] = 99
    before = threading.active_count()
    with pytest.raises(KeyError, match="a file is gone") as raised:
        ft.parallel(ft.grad(loss), 4, how=how, workers=2)(net_params(), batch)
    assert any("part 3 of 4 (3 examples)" in note for note in raised.value.__notes__)
    assert "loss" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert threading.active_count() == before


@pytest.mark.parametrize("how", HOWS)
def test_an_in_place_change_of_params_is_an_error_in_every_plan(how):
    def loss(params, batch):
        params["w"].mul_(2)
        return batch["x"] @ params["w"]

    params = {"w": torch.ones(3)}
    with pytest.raises(ft.LossError, match="in place"):
        ft.parallel(ft.grad(loss), 2, how=how)(params, net_batch(4))
    assert params["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("how", HOWS)
def test_weights_that_sum_to_zero(how):
    batch = net_batch(6) | {"weight": torch.zeros(6)}
    with pytest.raises(ft.LossError, match="sum to zero"):
        ft.parallel(ft.grad(net_loss), 3, how=how).finished(net_params(), batch)


def test_a_part_without_weight_has_no_mean_gradient_to_compare():
    batch = net_batch(9)
    batch["weight"][3:6] = 0
    with pytest.raises(ft.LossError, match="part 2 of 3 sum to zero"):
        ft.parallel(ft.grad(net_loss), 3, ft.reduce.median).finished(net_params(), batch)
    # The mean has nothing to compare: the part adds nothing.
    ft.parallel(ft.grad(net_loss), 3, how="loop").finished(net_params(), batch)


@pytest.mark.parametrize("how", ["loop", "threads"])
def test_negative_weights_name_the_part(how):
    batch = net_batch(8)
    batch["weight"][7] = -1.0
    with pytest.raises(ft.LossError, match="negative") as raised:
        ft.parallel(ft.grad(net_loss), 4, how=how)(net_params(), batch)
    assert any("part 4 of 4" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("parts", [0, -1, 2.0, True, "4"])
def test_parts_that_are_no_number(parts):
    with pytest.raises(ft.ArgumentError, match="parts must be"):
        ft.parallel(ft.grad(net_loss), parts)


@pytest.mark.parametrize("budget", [0, -5, 1.5, True])
def test_budgets_that_are_no_number_of_bytes(budget):
    with pytest.raises(ft.ArgumentError, match="budget"):
        ft.parallel(ft.grad(net_loss), 2, budget=budget)


def test_batch_norm_has_no_gradient_of_one_example():
    def loss(params, batch, *, carry):
        return net_loss(params, batch), carry

    with pytest.raises(ft.LossError, match="no example has a gradient of its own"):
        ft.parallel(ft.grad(loss), 2, ft.reduce.clip_per_example(1.0))


def test_a_keyed_reducer_asks_for_a_key():
    grad = ft.parallel(ft.grad(net_loss), 2, ft.reduce.private(1.0, 0.5))
    with pytest.raises(ft.LossError, match="key"):
        grad.finished(net_params(), net_batch(4))


@pytest.mark.parametrize("how", HOWS)
def test_torchs_threads_are_what_they_were(how):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ft.parallel(ft.grad(net_loss), 4, how=how, workers=3).finished(net_params(), net_batch(8))
        assert torch.get_num_threads() == threads


def test_explain_tells_the_cost_in_bytes():
    grad = ft.parallel(ft.grad(net_loss), 8, ft.reduce.median, how="threads", workers=2)
    text = str(ft.explain(ft.step(grad, ft.optim.sgd(0.1)), net_params()))
    assert "plan: threads (asked for)" in text
    assert "backward passes: 8, one for each part" in text
    size = sum(leaf.nbytes for leaf in ft.tree.leaves(net_params()))
    assert f"memory for gradients: 19 × params ({19 * size / 1024:.1f} KiB)" in text
    assert "exact=True would" in text
    assert "19 × params\n" in str(ft.explain(grad))


@pytest.mark.parametrize("how", HOWS)
def test_a_loss_that_changes_its_batch_or_params_behind_autograds_back(how):
    def doubling(params, batch):
        batch["x"].mul_(2)
        return batch["x"] @ params["w"]

    def training(params, batch):
        with torch.no_grad():
            params["w"].mul_(2)
        return batch["x"] @ params["w"]

    for loss in (doubling, training):
        with pytest.raises((ft.LossError, RuntimeError), match=r"in place|inplace|in-place"):
            ft.parallel(ft.grad(loss), 2, how=how)({"w": torch.ones(3)}, net_batch(4))


def test_what_a_loss_puts_into_the_dict_of_its_batch_stays_there():
    def loss(params, batch):
        batch["x"] = batch["x"] * 2
        return batch["x"] @ params["w"]

    batch = net_batch(4)
    before = batch["x"]
    for how in HOWS:
        ft.parallel(ft.grad(loss), 2, how=how)({"w": torch.ones(3)}, batch)
    assert batch["x"] is before


@pytest.mark.parametrize("how", HOWS)
def test_negative_weights_are_found_in_every_plan_and_by_clipping(how):
    batch = net_batch(6)
    batch["weight"][1] = -0.1
    for reducer in (ft.reduce.mean, ft.reduce.clip_per_example(1.0)):
        with pytest.raises(ft.LossError, match="negative"):
            ft.parallel(ft.grad(net_loss), 2, reducer, how=how).finished(net_params(), batch)


@pytest.mark.parametrize("how", HOWS)
def test_gradients_in_inference_mode(how):
    with torch.inference_mode(), pytest.raises(ft.ArgumentError, match="inference_mode"):
        ft.parallel(ft.grad(net_loss), 2, how=how)(net_params(), net_batch(4))


def test_iterators_that_end_in_a_loss_are_errors_and_not_ends():
    def loss(params, batch):
        return batch["x"] @ params["w"] * next(iter(()))

    for how in ("fused", "loop", "threads"):
        with pytest.raises(ft.LossError, match="StopIteration"):
            ft.parallel(ft.grad(loss), 2, how=how)({"w": torch.ones(3)}, net_batch(4))


def test_context_variables_and_torchs_modes_reach_the_workers():
    scale = contextvars.ContextVar("scale", default=1.0)
    scale.set(2.0)

    def loss(params, batch):
        return batch["x"] @ params["w"] * scale.get() * torch.ones(()).to(torch.float32)

    params = {"w": torch.ones(3)}
    one, other = (ft.parallel(ft.grad(loss), 2, how=how, workers=2)(params, net_batch(4)) for how in ("loop", "threads"))
    equal("context variables", other, one)
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.extend([func] if func is torch.tanh else [])
            return func(*args, **(kwargs or {}))

    with Watching():
        ft.parallel(ft.grad(lambda p, b: torch.tanh(b["x"] @ p["w"])), 2, how="threads", workers=2)(params, net_batch(4))
    assert seen == [torch.tanh] * 2


def test_a_combine_that_forgets_to_reduce_is_told_so():
    forgot = ft.reduce.gathered("forgot", lambda rows, weights: rows)
    with pytest.raises(ft.TreeError, match="reduce the first dimension"):
        ft.parallel(ft.grad(net_loss), 2, forgot).finished(net_params(), net_batch(4))


def test_reducers_that_are_not_called_and_too_few_parts():
    with pytest.raises(ft.ArgumentError, match=r"call it, ft\.reduce\.krum"):
        ft.parallel(ft.grad(net_loss), 5, ft.reduce.krum)
    with pytest.raises(ft.ArgumentError, match=r"needs at least 7 parts"):
        ft.parallel(ft.grad(net_loss), 6, ft.reduce.krum(2))
    assert "at least 7" in str(ft.explain(ft.reduce.krum(2)))
