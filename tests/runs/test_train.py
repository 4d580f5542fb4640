"""Stories of the training loop: epochs, rows, interruption, resumption, and what stops it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
    with pytest.raises(ft.RunError, match="other initial params"):
        ft.train(changed, run)


def test_two_cannot_train_in_one_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with run.locked(), pytest.raises(ft.RunError):
        ft.train(linear(), run)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_has_to_be_a_number_of_steps(tmp_path: Path, every: object) -> None:
    with pytest.raises(ft.ArgumentError, match="every"):
        ft.train(linear(), new_run(tmp_path / "run"), every=every)  # type: ignore[arg-type]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_state(one: ft.State, other: ft.State) -> None:
    for left, right in zip(ft.tree.leaves(one), ft.tree.leaves(other), strict=True):
        assert torch.equal(left, right)
