"""Coming from PrayTools.jl: each of its features, shown through the public names (the table is in README)."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.testing import equal, same_bits


def loss(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]).square()


PARAMS = {"w": torch.tensor([0.5, -1.0, 2.0])}


def rows(keys):
    """Three inputs and a target for each key: the sampler that they call `preparesamples`."""
    x = ft.random.normal(keys, (3,))
    return {"x": x, "y": x.sum(1)}


def batch(size, seed=0):
    return rows(ft.random.split(ft.random.key(seed), size))


# --- ptrain!: one producer, gradients of sub-batches on threads ----------------------------------------------------


@given(size=st.integers(1, 40), parts=st.integers(1, 9), workers=st.integers(1, 3))
def test_ptrain_sub_batches_on_threads_are_the_full_batch(size, parts, workers):
    threaded = ft.parallel(ft.grad(loss), parts, how="threads", workers=workers)
    equal("full batch", threaded.finished(PARAMS, batch(size)), ft.grad(loss).finished(PARAMS, batch(size)))


def test_ptrain_calls_back_after_each_update_exactly_iterations_times():
    produced, calls, losses = [], [], []

    def prepare(position):
        produced.append((position, threading.current_thread().name))
        return batch(20, position)

    step = ft.step(ft.parallel(ft.grad(loss), 4, how="threads", workers=2), ft.optim.sgd(0.05))
    state = step.init(PARAMS)
    for state, metrics in ft.fold(step, state, map(prepare, range(100)), steps=30):
        calls.append(int(state.position))  # cb()
        losses.append(float(metrics["loss"]))  # cby(loss)
    assert calls == list(range(1, 31))
    assert [position for position, _ in produced] == list(range(30))
    assert {name for _, name in produced} == {threading.main_thread().name}
    assert losses[-1] < losses[0] / 10


# --- ttrain!: each worker prepares its own sub-batch ---------------------------------------------------------------


def test_ttrain_each_worker_draws_its_own_part_once_an_iteration():
    seen = []

    def prepare(keys):
        seen.append((threading.current_thread().name, len(keys)))
        return rows(keys)

    source = ft.sampled(prepare, 10, seed=5)
    step = ft.step(ft.parallel(ft.grad(loss), 4, how="threads", workers=2, exact=True), ft.optim.sgd(0.05))
    states = [state for state, _ in ft.fold(step, step.init(PARAMS), source, steps=6)]
    assert [size for _, size in seen] != []
    assert len(seen) == 4 * 6
    assert sorted(size for _, size in seen) == sorted([3, 3, 2, 2] * 6)
    assert all(name.startswith("functrain-part") for name, _ in seen)
    # As when one producer prepares all, and reproducible.
    whole = step.init(PARAMS)
    for place in range(6):
        whole, _ = step(whole, source(place).whole())
    same_bits("one producer", states[-1], whole)
    again = [state for state, _ in ft.fold(step, step.init(PARAMS), ft.sampled(rows, 10, seed=5), steps=6)]
    same_bits("again", again[-1], whole)


def test_ttrain_over_a_dataset():
    source = ft.arrays(batch(50)).shuffle(seed=1).batch(20)
    step = ft.step(ft.parallel(ft.grad(loss), 3, how="threads", workers=2, exact=True), ft.optim.sgd(0.05))
    (*_, (own, _)), (*_, (one, _)) = (
        list(ft.fold(step, step.init(PARAMS), batches, steps=7)) for batches in (source.deferred(), source)
    )
    same_bits("their own parts", own, one)


# --- dividebatch -----------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 200), parts=st.integers(1, 20))
def test_dividebatch(size, parts):
    whole = {"x": torch.arange(size), "y": (torch.arange(size).float(),)}
    cut = ft.tree.divide(whole, parts)
    sizes = [len(part["x"]) for part in cut]
    assert len(cut) == min(size, parts)
    assert max(sizes) - min(sizes) <= 1
    same_bits("together, in order", ft.tree.concat(cut), whole)


def test_dividebatch_of_a_hundred_in_eight_gives_eight():
    assert len(ft.tree.divide(torch.arange(100), 8)) == 8
    with pytest.raises(ft.TreeError, match=r"agree|leaves"):
        ft.tree.divide({"x": torch.zeros(3), "y": torch.zeros(4)}, 2)


# --- the tree of reductions -------------------------------------------------------------------------------------------


def test_reduction_has_one_tree_for_any_number_of_workers():
    assert [ft.tree.depth(parts) for parts in (1, 2, 3, 8, 9)] == [0, 1, 2, 3, 4]
    torch.set_num_threads(2)
    data = batch(37)
    before = ft.tree.map(torch.clone, (PARAMS, data))
    taken = [ft.parallel(ft.grad(loss), 8, workers=workers, exact=True)(PARAMS, data) for workers in (1, 2, 3, 8)]
    for other in taken[1:]:
        same_bits("workers", other, taken[0])
    same_bits("inputs are as they were", (PARAMS, data), before)
    same_bits("None + g", ft.reduce.add(None, taken[0]), taken[0])
    same_bits("g + None", ft.reduce.add(taken[0], None), taken[0])


# --- BackgroundDataLoader ---------------------------------------------------------------------------------------------


class Loads(ft.Source):
    """Counts what is loading or loaded and not yet taken."""

    def __init__(self, length, fails=None):
        self.length, self.fails, self.begun, self.lock = length, fails, 0, threading.Lock()

    def get(self, i, epoch):
        with self.lock:
            self.begun += 1
        if i == self.fails:
            raise OSError("this load fails")
        return torch.tensor(i)


def test_background_loading_is_bounded_ordered_and_ends():
    source = Loads(20)
    taken = []
    with ft.prefetch(source, depth=3) as items:
        for item in items:
            taken.append(item.item())
            assert source.begun <= len(taken) + 3
    assert taken == list(range(20))


def test_background_loading_can_be_stopped_at_any_moment():
    before = threading.active_count()
    source = Loads(10_000)
    with ft.prefetch(source, depth=4) as items:
        assert next(iter(items)).item() == 0
    assert threading.active_count() == before
    with pytest.raises(KeyError), ft.prefetch(source, depth=4):
        raise KeyError
    assert threading.active_count() == before


def test_a_load_that_fails_reaches_the_consumer_at_its_place():
    taken = []
    with ft.prefetch(Loads(9, fails=5), depth=4) as items, pytest.raises(OSError, match="this load fails"):
        taken.extend(item.item() for item in items)
    assert taken == [0, 1, 2, 3, 4]


# --- initevalcby -------------------------------------------------------------------------------------------------------


def test_initevalcby_rows_at_multiples_of_k_with_the_mean_of_the_last_k(tmp_path):
    best = ft.Best("size", maximize=False)
    history = ft.History(10, measure=lambda state: {"size": state.params["w"].norm().item()}, directory=tmp_path, keep=best)
    step = ft.step(ft.grad(loss), ft.optim.sgd(0.05))
    losses = []
    for state, metrics in history(ft.fold(step, step.init(PARAMS), ft.sampled(rows, 16), steps=35)):
        losses.append(metrics["loss"].item())
    assert [row["steps"] for row in history.rows] == [10, 20, 30]
    for row in history.rows:
        assert row["loss"] == pytest.approx(np.mean(losses[row["steps"] - 10 : row["steps"]]))
        assert row["seconds"] > 0
    assert history.rows[-1]["size"] != state.params["w"].norm().item()
    assert best.value == min(row["size"] for row in history.rows)
    assert list(tmp_path.iterdir())


# --- undocumented, but there -------------------------------------------------------------------------------------------


def test_igradient_the_and_mask():
    parts = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    grad = ft.grad(lambda params, batch: batch @ params)
    for tau, expected in ((0.5, [1.0, 0.0, -1.0]), (0.0, [1.0, 1 / 3, -1.0])):
        masked = ft.parallel(grad, 3, ft.reduce.and_mask(tau)).finished(torch.zeros(3), parts)
        equal(f"tau {tau}", masked.grads, torch.tensor(expected))


def test_autotrain_measures_and_picks_the_fastest():
    shown = []
    step = ft.step(ft.parallel(ft.grad(loss), 4), ft.optim.sgd(0.05))
    source = ft.arrays(batch(64)).batch(32)
    tuned = ft.tune(step, step.init(PARAMS), source, parts=(1, 2), workers=(2,), steps=3, show=shown.append)
    measured = [row.seconds for row in tuned.rows if math.isfinite(row.seconds)]
    assert len(measured) >= 3
    assert shown == [str(tuned)]
    state, _ = tuned.step(tuned.step.init(PARAMS), batch(32))
    expected, _ = step(step.init(PARAMS), batch(32))
    equal("the same step", state.params, expected.params)


def test_gradinfo():
    info = ft.health({"w": torch.tensor([3.0, -4.0, torch.nan, torch.inf])})["w"]
    assert [int(info.nan), int(info.inf), float(info.norm), float(info.max)] == [1, 1, 5.0, 4.0]


def test_best_model_keeper():
    best = ft.Best("accuracy")
    step = ft.step(ft.grad(loss), ft.optim.sgd(0.05), donate=True)
    state = step.init(PARAMS)
    for place, accuracy in enumerate([-3.0, -1.0, float("nan"), -2.0]):
        state, _ = step(state, batch(8, place))
        best.offer(accuracy, state)
    assert (best.value, best.position) == (-1.0, 2)
    assert best.state.params["w"].numel() == 3


def test_initbatchprovider_class_balanced_batches():
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 3)
    source = ft.arrays({"x": torch.arange(60), "y": labels}).balanced(labels, seed=0).batch(12)
    for number in range(2 * len(source)):
        counts = torch.bincount(source.repeat()(number)["y"], minlength=3)
        assert counts.tolist() == [4, 4, 4]
