"""Stories of the training loop: epochs, rows, interruption, resumption, and what stops it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functrain as ft
from functrain.runs.events import EpochEnded, Saved, Started, Stepped


def linear(epochs: int = 3, rate: float = 0.1, depth: int = 2, examples: int = 10) -> ft.Experiment:
    """Least squares in 10 examples, batches of 4 (the last one ragged), with keyed noise on the inputs."""
    x = ft.random.normal(ft.random.key(1), (examples, 3))
    data = {"x": x, "y": x @ torch.tensor([1.0, -2.0, 3.0])}

    def loss(params, batch, *, key):
        noisy = batch["x"] + 0.01 * ft.random.normal(key, (3,))
        return (noisy @ params["w"] - batch["y"]) ** 2

    source = ft.arrays(data).shuffle(seed=3).batch(4)
    step = ft.step(ft.grad(loss), ft.optim.adam(ft.optim.cosine(rate, 100)))

    def evaluate(state):
        plain = lambda params, batch: (batch["x"] @ params["w"] - batch["y"]) ** 2  # noqa: E731
        return {"test/loss": ft.evaluate(plain, state.params, source)["loss"]}

    return ft.Experiment(step, {"w": torch.zeros(3)}, source, epochs, evaluate, seed=5, depth=depth)


def new_run(path: Path) -> ft.Run:
    return ft.Run.create(path, config={}, facts={})


def test_a_run_logs_an_epoch_a_row_and_checkpoints_its_end(tmp_path: Path) -> None:
    run, events = new_run(tmp_path / "run"), []
    trained = ft.train(linear(), run, observers=[events.append])
    assert not trained.interrupted
    assert [row["epoch"] for row in trained.rows] == [1, 2, 3]
    assert [row["position"] for row in trained.rows] == [3, 6, 9]
    assert {"train/loss", "train/lr", "test/loss", "seconds"} <= trained.rows[0].keys()
    assert trained.rows[-1]["test/loss"] < trained.rows[0]["test/loss"]
    assert run.checkpoints.newest() == 9
    assert [type(event) for event in events[:3]] == [Started, Saved, Stepped]
    assert sum(isinstance(event, EpochEnded) for event in events) == 3
    assert [event.position for event in events if isinstance(event, Saved)] == [0, 3, 6, 9]


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples(tmp_path: Path) -> None:
    still = linear(epochs=1, rate=0.0)
    row = ft.train(still, new_run(tmp_path / "run")).rows[0]
    losses = []
    for position, batch in enumerate(still.train):
        key = ft.random.fold_in(still.initial().key, position)
        sums = ft.grad(lambda p, b, *, key: (_noisy(b, key) @ p["w"] - b["y"]) ** 2)({"w": torch.zeros(3)}, batch, key=key)
        losses.append(float(sums.loss))
    assert row["train/loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)


def _noisy(batch: dict[str, torch.Tensor], key: torch.Tensor) -> torch.Tensor:
    return batch["x"] + 0.01 * ft.random.normal(key, (3,))


@pytest.mark.parametrize("stop", range(1, 9))
@pytest.mark.parametrize("depth", [0, 3])
def test_interrupted_after_any_step_and_resumed_is_undisturbed(tmp_path: Path, stop: int, depth: int) -> None:
    whole = ft.train(linear(depth=depth), new_run(tmp_path / "whole"))
    run, asked = new_run(tmp_path / "cut"), [0]

    def interrupted() -> bool:
        asked[0] += 1
        return asked[0] == stop + 1

    first = ft.train(linear(depth=depth), run, interrupted=interrupted)
    assert first.interrupted
    again = ft.train(linear(depth=depth), ft.Run.open(run.path))
    assert not again.interrupted
    assert_same_state(whole.state, again.state)
    assert without_seconds(whole.rows) == without_seconds(again.rows)


def test_a_run_that_has_ended_stays_as_it_is(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    first = ft.train(linear(), run)
    second = ft.train(linear(), run)
    assert second.rows == first.rows
    assert_same_state(first.state, second.state)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    run, events = new_run(tmp_path / "run"), []
    whole = ft.train(linear(), run)
    state = run.path / "checkpoints" / "step-00000009" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x00")
    again = ft.train(linear(), run, observers=[events.append])
    assert events[0].position == 6
    assert "step-00000009" in events[0].skipped[0]
    assert_same_state(whole.state, again.state)
    assert without_seconds(whole.rows) == without_seconds(again.rows)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    source = ft.arrays(torch.tensor([1.0, 1.0, float("nan"), 1.0])).batch(1)
    step = ft.step(ft.grad(lambda params, batch: (params - batch) ** 2), ft.optim.sgd(0.1))
    experiment = ft.Experiment(step, torch.tensor(0.0), source, 2)
    with pytest.raises(ft.RunError, match=r"nan at step 3 \(the batch of position 2\)"):
        ft.train(experiment, new_run(tmp_path / "run"))


def test_another_experiment_cannot_go_on_in_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    ft.train(linear(), run)
    other = linear()
    changed = ft.Experiment(other.step, {"w": torch.ones(3)}, other.train, 4)
    with pytest.raises(ft.RunError, match="another initial state"):
        ft.train(changed, run)


def test_two_cannot_train_in_one_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with run.locked(), pytest.raises(ft.RunError):
        ft.train(linear(), run)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_has_to_be_a_number_of_steps(tmp_path: Path, every: object) -> None:
    with pytest.raises(ft.ArgumentError, match="every"):
        ft.train(linear(), new_run(tmp_path / "run"), every=every)  # type: ignore[arg-type]


# --- what is not finite, and what lies otherwise in memory --------------------------------------------------------


def stop_after(steps: int) -> Callable[[], bool]:
    asked = [0]

    def interrupted() -> bool:
        asked[0] += 1
        return asked[0] > steps

    return interrupted


def test_a_measure_that_is_infinite_survives_an_epoch_cut_in_the_middle(tmp_path: Path) -> None:
    def loss(params, batch):
        most = torch.where(batch == 3, torch.inf, batch)
        return ft.Losses((batch - params) ** 2, aux={"most": most, "odd": most - most})

    def made() -> ft.Experiment:
        step = ft.step(ft.grad(loss), ft.optim.sgd(0.01))
        return ft.Experiment(step, torch.tensor(0.5), ft.arrays(torch.arange(16.0)).batch(4), 2)

    whole = ft.train(made(), new_run(tmp_path / "whole"))
    assert ft.train(made(), new_run(tmp_path / "cut"), interrupted=stop_after(2)).interrupted
    again = ft.train(made(), ft.Run.open(tmp_path / "cut"))
    assert_same_state(whole.state, again.state)
    assert [row["train/most"] for row in again.rows] == [float("inf")] * 2
    assert str(without_seconds(again.rows)) == str(without_seconds(whole.rows))


def sharp(root: float) -> Callable[..., torch.Tensor]:
    """A loss that is finite everywhere, with a gradient that is not where the batch has `root`."""
    return lambda params, batch: batch + 0 * (params["m"] - params["m"] + (batch != root)).sqrt()


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("at", [3, 4, 7, 8])
def test_params_that_are_not_finite_are_never_saved(tmp_path: Path, at: int, every: int | None) -> None:
    def made(root: float) -> ft.Experiment:
        step = ft.step(ft.grad(sharp(root)), ft.optim.sgd(0.1))
        params = {"m": torch.tensor(0.5), "mask": torch.tensor([0.0, -torch.inf])}
        return ft.Experiment(step, params, ft.arrays(torch.arange(1.0, 9.0)).batch(2), 2)

    run = new_run(tmp_path / "run")
    newest = 0 if every is None else (at - 1) // 2
    seen = f"after step {(at + 1) // 2}, params/m hold nan or inf.*of position {newest}, is from before"
    if every is None and at < 7:  # within the epoch nobody looks at params, but at the next loss
        seen = r"the loss is nan at step 3 \(the batch of position 2\).*the gradient of the step before"
    with pytest.raises(ft.RunError, match=seen):
        ft.train(made(float(at)), run, every=every)
    assert run.checkpoints.newest() == newest
    assert run.rows() == []
    mended = ft.train(made(0.0), ft.Run.open(run.path))
    assert_same_state(mended.state, ft.train(made(0.0), new_run(tmp_path / "other")).state)


def test_a_carry_that_stops_being_finite_is_not_saved_but_one_that_never_was_is(tmp_path: Path) -> None:
    def loss(params, batch, *, carry):
        carry = {"least": torch.minimum(carry["least"], batch.min()), "sum": carry["sum"] + batch.sum() * torch.inf}
        return (batch - params) ** 2, carry

    step = ft.step(ft.grad(loss), ft.optim.sgd(0.1))
    start = {"least": torch.tensor(torch.inf), "sum": torch.tensor(0.0)}
    experiment = ft.Experiment(step, torch.tensor(0.0), ft.arrays(torch.ones(4)).batch(2), 1, carry=start)
    with pytest.raises(ft.RunError, match=r"after step 2, carry/sum hold nan or inf"):
        ft.train(experiment, new_run(tmp_path / "run"))


def test_a_batch_of_no_weight_is_named_and_not_saved(tmp_path: Path) -> None:
    step = ft.step(ft.grad(lambda params, batch: ((batch - params) ** 2, (batch > 4) * 1.0)), ft.optim.sgd(0.01))
    experiment = ft.Experiment(step, torch.tensor(0.0), ft.arrays(torch.tensor([5.0, 6.0, 1.0, 2.0])).batch(2), 2)
    run = new_run(tmp_path / "run")
    with pytest.raises(ft.FunctrainError, match=r"weights of th(is|at) batch"):
        ft.train(experiment, run, every=1)
    assert run.checkpoints.newest() == 1


def test_channels_last_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 14 * 14, 10)]
    params, apply = ft.functional(nn.Sequential(*layers).to(memory_format=torch.channels_last))
    data = ft.arrays({"x": torch.randn(64, 3, 16, 16), "y": torch.arange(64) % 10}).batch(16)

    def loss(params, batch):
        return F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")

    experiment = ft.Experiment(ft.step(ft.grad(loss), ft.optim.adamw(1e-3)), params, data, 2)
    whole = ft.train(experiment, new_run(tmp_path / "whole"))
    ft.train(experiment, new_run(tmp_path / "cut"), interrupted=stop_after(3))
    again = ft.train(experiment, ft.Run.open(tmp_path / "cut"))
    assert_same_state(whole.state, again.state)
    assert [leaf.stride() for leaf in ft.tree.leaves(again.state)] == [leaf.stride() for leaf in ft.tree.leaves(whole.state)]


def test_a_carry_that_comes_to_lie_otherwise_goes_on_so(tmp_path: Path) -> None:
    def loss(params, batch, *, carry):
        hidden = torch.stack([carry["h"], batch @ params["w"]], 1)  # (N, 2, 3)
        return hidden.square().sum((1, 2)), {"h": hidden[:, -1].detach(), "t": carry["t"].t().contiguous().t()}

    start = {"h": torch.zeros(2, 3), "t": torch.zeros(2, 3)}
    step = ft.step(ft.grad(loss), ft.optim.sgd(0.01))
    source = ft.arrays(ft.random.normal(ft.random.key(0), (8, 3))).batch(2)
    experiment = ft.Experiment(step, {"w": torch.eye(3)}, source, 2, carry=start)
    cut = ft.train(experiment, new_run(tmp_path / "cut"), interrupted=stop_after(3))
    loaded = ft.Run.open(tmp_path / "cut").checkpoints.load(experiment.initial()).state
    for name in start:
        assert cut.state.carry[name].stride() == loaded.carry[name].stride() != start[name].stride()


# --- evaluate -----------------------------------------------------------------------------------------------------


def least_squares(evaluate: Any) -> ft.Experiment:
    step = ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.sgd(0.1))
    return ft.Experiment(step, torch.tensor(0.0), ft.arrays(torch.arange(8.0)).batch(4), 3, evaluate)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, r"evaluate\(state\) returned None \(NoneType\): expected a dict"),
        (0.5, "expected a dict of numbers by name"),
        ({1: 0.5}, "expected a dict of numbers by name"),
        ({"test/loss": "0.5"}, "measure 'test/loss' is '0.5' .str.: expected a number"),
        ({"test/loss": torch.ones(2)}, "measure 'test/loss'"),
        ({"position": 1}, "evaluate gives 'position', which each row of metrics has already"),
        ({"seconds": 1, "epoch": 3}, "'seconds', 'epoch'"),
        ({"train/loss": 1.0}, "'train/loss'"),
    ],
)
def test_an_evaluation_that_breaks_its_contract_says_so_and_loses_no_epoch(tmp_path: Path, found: Any, says: str) -> None:
    def right(state: Any) -> dict[str, Any]:
        return {"test/params": state.params}

    whole = ft.train(least_squares(right), new_run(tmp_path / "whole"))
    run, events = new_run(tmp_path / "run"), []
    for _ in range(2):
        with pytest.raises(ft.ArgumentError, match=says):
            ft.train(least_squares(lambda state: found), ft.Run.open(run.path), observers=[events.append])
        assert run.checkpoints.newest() == 2
        assert run.rows() == []
    assert sum(isinstance(event, Stepped) for event in events) == 2
    again = ft.train(least_squares(right), ft.Run.open(run.path))
    assert_same_state(whole.state, again.state)
    assert without_seconds(whole.rows) == without_seconds(again.rows)


def test_a_row_that_a_kill_left_before_its_checkpoint_is_written_once(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        ft.train(least_squares(lambda state: 1 / 0), run)
    left = run.path / "checkpoints" / "step-00000002"
    left.rename(tmp_path / "left")
    whole = ft.train(least_squares(lambda state: {"one": 1}), run)
    for place in run.checkpoints.folder.glob("step-*"):
        shutil.rmtree(place)
    (tmp_path / "left").rename(left)
    again = ft.train(least_squares(lambda state: {"one": 1}), run)
    assert without_seconds(again.rows) == without_seconds(whole.rows)


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_state(one: ft.State, other: ft.State) -> None:
    for left, right in zip(ft.tree.leaves(one), ft.tree.leaves(other), strict=True):
        assert torch.equal(left, right)


def test_a_score_that_evaluate_does_not_give_is_an_error(tmp_path: Path) -> None:
    made = linear()
    wrong = ft.Experiment(made.step, made.params, made.train, 1, made.evaluate, score="test/accuracy")
    with pytest.raises(ft.ArgumentError, match=r"score is 'test/accuracy', and evaluate gives 'test/loss'"):
        ft.train(wrong, new_run(tmp_path / "run"))
