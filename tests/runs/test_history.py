"""Histories of loops: rows at k, 2k, …, each with the mean of exactly the last k losses, in memory and on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import keyed_loss, net_batch, net_loss, net_params

import functrain as ft
from functrain.testing import same_bits


def loop(step, state, count: int, size: int = 3):
    return ft.fold(step, state, [net_batch(size, place) for place in range(count)])


def plain_step(donate: bool = False):
    return ft.step(ft.grad(keyed_loss), ft.optim.adam(0.05), donate=donate)


@given(steps=st.integers(0, 150), every=st.integers(1, 80), losses=st.randoms(use_true_random=False))
def test_rows_are_means_of_exactly_the_last_losses(steps, every, losses):
    values = [losses.uniform(-1e3, 1e3) for _ in range(steps)]
    state = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1)).init(net_params())
    pairs = [
        (state._replace(position=torch.tensor(7 + place)), {"loss": torch.tensor(value, dtype=torch.float64)})
        for place, value in enumerate(values, 1)
    ]
    history = ft.History(every)
    assert [pair[1] for pair in history(iter(pairs))] == [pair[1] for pair in pairs]
    assert [row["steps"] for row in history.rows] == list(range(every, steps + 1, every))
    assert [row["position"] for row in history.rows] == [7 + row["steps"] for row in history.rows]
    means = [np.mean(values[end - every : end]) for end in range(every, steps + 1, every)]
    assert [row["loss"] for row in history.rows] == pytest.approx(means, rel=1e-12, abs=1e-9)
    assert all(list(row) == ["steps", "position", "loss", "seconds"] for row in history.rows)
    seconds = [row["seconds"] for row in history.rows]
    assert seconds == sorted(seconds)
    assert all(value >= 0 for value in seconds)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_loop_is_the_same_with_and_without_a_history(donate):
    step = plain_step(donate)
    history = ft.History(2, measure=lambda state: {"scale": state.params["scale"], "seen": int(state.position)})
    plain, rows = None, []
    for plain, metrics in loop(step, step.init(net_params()), 5):
        rows.append((float(metrics["loss"]), float(plain.params["scale"])))
    seen = []
    for state, _ in history(loop(step, step.init(net_params()), 5)):
        # The row of a step is there before the loop's body runs.
        seen.append(len(history.rows))
    assert seen == [0, 1, 1, 2, 2]
    same_bits("the state", state, plain)
    for row, (first, second) in zip(history.rows, [(0, 1), (2, 3)]):
        assert row["loss"] == pytest.approx((rows[first][0] + rows[second][0]) / 2, rel=1e-12)
        assert row["scale"] == rows[second][1]
        assert row["seen"] == row["position"] == second + 1


def test_steps_are_counted_on_from_loop_to_loop():
    step, history = plain_step(), ft.History(4)
    state = step.init(net_params())
    for _ in range(3):
        for state, _metrics in history(loop(step, state, 3)):
            pass
    assert [row["position"] for row in history.rows] == [4, 8]
    assert repr(history) == "<History of 9 steps: 2 rows, one every 4 steps>"


def test_a_loop_may_be_left():
    step, history = plain_step(), ft.History(2)
    for state, _ in history(loop(step, step.init(net_params()), 100)):
        if history.rows:
            break
    assert (history.steps, int(state.position)) == (2, 2)


def test_no_graph_stays_alive():
    freed = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.mark = Mark()
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient

    class Mark:
        def __del__(self):
            freed.append(1)

    def pairs():
        for place in range(3):
            yield state._replace(position=torch.tensor(place)), {"loss": Watched.apply(torch.ones((), requires_grad=True))}

    state, history = plain_step().init(net_params()), ft.History(3)
    for _, metrics in history(pairs()):
        del metrics
    assert len(freed) == 3
    assert history.rows[0]["loss"] == 1.0


def test_skipped_steps_are_left_out_of_the_mean_and_counted():
    def loss(params, batch):
        return (params - batch) ** 2

    step = ft.guard(ft.step(ft.grad(loss), ft.optim.sgd(0.0)))
    batches = [torch.tensor([value]) for value in (1.0, math.nan, 2.0, 3.0, math.nan, math.inf)]
    history = ft.History(2)
    for _ in history(ft.fold(step, step.init(torch.tensor(0.0)), batches)):
        pass
    assert [row["skipped"] for row in history.rows] == [1, 0, 2]
    assert [row["loss"] for row in history.rows[:2]] == [1.0, (4 + 9) / 2]
    assert math.isnan(history.rows[2]["loss"])
    bare = ft.History(2)
    for _ in bare(ft.fold(ft.step(ft.grad(loss), ft.optim.sgd(0.0)), step.init(torch.tensor(0.0)), batches)):
        pass
    # Unguarded, NaN stays in the params for good.
    assert all(math.isnan(row["loss"]) for row in bare.rows)
    assert "skipped" not in bare.rows[0]


def test_repeated_steps_and_populations_count_as_one_step_with_the_mean_of_their_losses():
    def loss(params, batch):
        return (params - batch) ** 2

    values = torch.tensor([[1.0], [math.nan], [2.0], [3.0]])
    step = ft.step(ft.grad(loss), ft.optim.sgd(0.0))
    for many in (ft.repeat(ft.guard(step), 4), ft.guard(ft.repeat(step, 4))):
        history = ft.History(1)
        for _ in history(ft.fold(many, step.init(torch.tensor(0.0)), [values, values[[0, 0, 2, 3]]])):
            pass
        means = [(1 + 4 + 9) / 3 if "repeat" in ft.explain(many).title else math.nan, (1 + 1 + 4 + 9) / 4]
        assert [row["loss"] for row in history.rows] == pytest.approx(means, nan_ok=True)
        assert [row["skipped"] for row in history.rows] == [0.25 if "repeat" in ft.explain(many).title else 1, 0]
    together = ft.population(step)
    history = ft.History(1)
    members = [step.init(torch.tensor(start)) for start in (0.0, 1.0)]
    for _ in history(ft.fold(together, together.init(members), [torch.tensor([3.0])])):
        pass
    assert history.rows[0]["loss"] == (9 + 4) / 2
    assert history.rows[0]["position"] == 1


def test_a_best_is_offered_each_row():
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(0.0))
    scores = iter([0.5, 0.9, math.nan, 0.9])
    best = ft.Best("accuracy")
    history = ft.History(2, measure=lambda state: {"accuracy": next(scores)}, keep=best)
    for _ in history(loop(step, step.init(net_params()), 8)):
        pass
    assert (best.value, best.position) == (0.9, 4)
    lowest = ft.Best("loss", maximize=False)
    step = plain_step(donate=True)
    history = ft.History(1, keep=lowest)
    for _ in history(loop(step, step.init(net_params()), 8)):
        pass
    least = min(history.rows, key=lambda row: row["loss"])
    assert (lowest.value, lowest.position) == (least["loss"], least["position"])
    assert lowest.state.position.item() == least["position"]


# --- on disk ------------------------------------------------------------------------------------------------------


def test_rows_and_state_are_on_disk_before_the_body_runs(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    step = plain_step(donate=True)
    history = ft.History(2, measure=lambda state: {"accuracy": math.inf}, directory=folder)
    like = ft.tree.map(torch.zeros_like, step.init(net_params()))
    for state, _ in history(loop(step, step.init(net_params()), 5)):
        if history.steps % 2 == 0:
            assert ft.History.read(folder) == history.rows
            same_bits("the state", ft.load_tree(folder / "state.safetensors", like), state)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == [2, 4]
    assert json.loads(lines[0])["accuracy"] == "inf"
    # A kill in the middle of a line.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"steps": 6, "pos')
    assert ft.History.read(folder) == history.rows
    with pytest.raises(ft.RunError, match="choose another directory"):
        ft.History(2, directory=folder)


def test_a_directory_that_cannot_be_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ft.RunError, match="could not make the directory"):
        ft.History(1, directory=tmp_path / "file")
    ft.Run.create(tmp_path / "run", {}, {})
    with pytest.raises(ft.RunError, match="history or run already"):
        ft.History(1, directory=tmp_path / "run")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, True, 2.0, "3", None])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ft.ArgumentError, match="at least 1"):
        ft.History(every)


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (lambda state: 3.0, "a dict of numbers by name"),
        (lambda state: {"accuracy": "high"}, "measure 'accuracy' is 'high'"),
        (lambda state: {"accuracy": torch.ones(2)}, "expected a number"),
    ],
)
def test_a_measure_gives_numbers_by_names_of_their_own(measure, text):
    step, history = plain_step(), ft.History(2, measure=measure)
    with pytest.raises(ft.ArgumentError, match=text):
        list(history(loop(step, step.init(net_params()), 2)))
    assert history.rows == []


def test_other_refusals():
    with pytest.raises(ft.ArgumentError, match="measure is a function"):
        ft.History(1, measure={"accuracy": 1.0})
    with pytest.raises(ft.ArgumentError, match="keep is a Best"):
        ft.History(1, keep="accuracy")
    step, history = plain_step(), ft.History(1, keep=ft.Best("accuracy"))
    with pytest.raises(ft.ArgumentError, match="keep has the score 'accuracy', and a row has 'steps', 'position', 'loss'"):
        list(history(loop(step, step.init(net_params()), 1)))

    def broken(state):
        raise ft.ArgumentError("no")

    with pytest.raises(ft.ArgumentError, match="no") as caught:
        list(ft.History(1, measure=broken)(loop(step, step.init(net_params()), 1)))
    assert caught.value.__notes__ == ["in the measure of a History, at step 1"]


def test_a_measure_may_have_a_loss_of_its_own():
    step = ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.sgd(0.25))
    history = ft.History(1, measure=lambda state: {"loss": 7.0, "other": 1.0})
    for _ in history(ft.fold(step, step.init(torch.tensor(0.0)), [torch.ones(1)] * 2)):
        pass
    # (1 − 0)² and, after a step of 0.5, (1 − 0.5)².
    assert [(row["loss"], row["measured.loss"], row["other"]) for row in history.rows] == [(1.0, 7.0, 1.0), (0.25, 7.0, 1.0)]
