"""Configs that share a population where their numbers are in the state alone, and run alone, with a reason, elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trials

import functrain as ft
from functrain.search import SearchResult, grid, grid_search


def both(over: Any, together: tuple[str, ...], trial: Any = trials.line) -> SearchResult:
    """The search with `together`, seen to give the scores that it gives without."""
    joined, alone = grid_search(trial, over, together=together), grid_search(trial, over)
    scores = {str(found.config): found.score for found in alone.trials}
    assert {str(found.config) for found in joined.trials} == set(scores)
    for found in joined.trials:
        assert found.score == pytest.approx(scores[str(found.config)], rel=1e-4, nan_ok=True)
    return joined


def ways(result: SearchResult) -> list[str]:
    return sorted(trial.how for trial in result.trials)


def test_groups_run_as_populations_and_say_so() -> None:
    result = both(grid(optimizer=["sgd", "adam"], lr=[0.1, 0.2, 0.4], start=[0, 1]), ("lr", "start"))
    assert ways(result) == ["population of 6"] * 12
    text = str(result.explain())
    assert text.count("population of 6") == 2
    assert "{'optimizer': 'adam'} with lr, start varied" in text
    assert len(result.trials[0].history) == 2
    assert result.trials[0].history[-1] == result.trials[0].measures


def test_names_may_lie_inside_nested_configs() -> None:
    def trial(config: dict[str, Any]) -> ft.Experiment:
        return trials.line({"optimizer": config["opt"]["name"], "lr": config["opt"]["lr"]})

    result = both(grid(opt=grid(name=["sgd", "adam"], lr=[0.1, 0.2])), ("opt.lr",), trial)
    assert ways(result) == ["population of 2"] * 4


@pytest.mark.parametrize(
    ("over", "together", "reason"),
    [
        (grid(closure=[1.0, 1.001]), ("closure",), "a number is used outside of the state"),
        (grid(closure=[1.0, 1.001], optimizer="adam"), ("closure",), "a number is used outside of the state"),
        (grid(order=[0, 1]), ("order",), "the train sources differ"),
        (grid(batch=[3, 4]), ("batch",), "the train sources differ"),
        (grid(epochs=[1, 2]), ("epochs",), "epochs differ: 1 and 2"),
        (grid(optimizer=["sgd", "adam"]), ("optimizer",), "the initial states differ in structure"),
        (grid(optimizer=["adamw", "adam"]), ("optimizer",), "the steps differ in more than numbers"),
        (grid(size=[1, 2]), ("size",), "the initial states differ at params.mean: float32 (1,)"),
        (grid(lr=[0.1, 0.2], compiled=True), ("lr",), "takes the state's buffers over"),
        (grid(lr=[0.1, 0.2], epochs=0), ("lr",), "no steps to run together"),
    ],
)
def test_what_keeps_configs_apart(over: Any, together: tuple[str, ...], reason: str) -> None:
    result = both(over, together)
    assert ways(result) == ["alone"] * 2
    assert reason in str(result.explain())


def test_those_that_agree_stay_together() -> None:
    result = both(grid(closure=[1.0, 2.0], lr=[0.1, 0.2]), ("lr", "closure"))
    assert ways(result) == ["alone", "alone", "population of 2", "population of 2"]


def momentum(config: dict[str, Any]) -> ft.Experiment:
    """An optimizer of the user's own whose momentum is a closure: it shows in the second step only."""
    inner = ft.optim.sgd(0.1)

    def init(params: Any) -> Any:
        return inner.init(params), ft.tree.map(torch.zeros_like, params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        velocity = ft.tree.map(lambda v, g: config["momentum"] * v + g, state[1], grads)
        updates, after = inner.update(velocity, state[0], params)
        return updates, (after, velocity)

    base = trials.line({})
    step = ft.step(ft.grad(lambda params, batch: (batch - params["mean"]) ** 2), ft.optim.Optimizer(init, update))
    return ft.Experiment(step, base.params, base.train, 2, base.evaluate, score="distance", maximize=False)


def test_a_closure_that_shows_in_the_second_step_only_is_seen() -> None:
    result = both(grid(momentum=[0.5, 0.9]), ("momentum",), momentum)
    assert ways(result) == ["alone"] * 2
    assert "at step 1" in str(result.explain())


def hidden(config: dict[str, Any]) -> ft.Experiment:
    """Batches that differ from the third on only, with sources that look alike."""
    base = trials.line({})
    shifted = ft.arrays(torch.arange(12.0)).map(lambda x: x + (x > 7) * config["shift"]).batch(4)
    return ft.Experiment(base.step, base.params, shifted, 1, base.evaluate, score="distance", maximize=False)


def test_sources_that_look_alike_are_compared_by_their_batches() -> None:
    result = both(grid(shift=[0, 1]), ("shift",), hidden)
    assert "different batches at step 2" in str(result.explain())


def unbatched(config: dict[str, Any]) -> ft.Experiment:
    """A loss that vmap has no rule for."""
    base = trials.line({})

    def loss(params: Any, batch: torch.Tensor) -> torch.Tensor:
        return (batch - params["mean"]).abs() * (1.0 if float(params["mean"].detach()) > -9 else 2.0)

    step = ft.step(ft.grad(loss), ft.optim.sgd(config["lr"]))
    return ft.Experiment(step, base.params, base.train, 2, base.evaluate, score="distance", maximize=False)


def test_a_step_that_cannot_be_vmapped_runs_alone() -> None:
    result = both(grid(lr=[0.1, 0.2]), ("lr",), unbatched)
    assert ways(result) == ["alone"] * 2
    assert "the population raised" in str(result.explain())


def test_trials_that_return_numbers_are_called_once_each(tmp_path: Path) -> None:
    over = grid(x=[1, 2, 3], log=tmp_path / "log")
    result = grid_search(trials.counted, over, together=("x",))
    assert ways(result) == ["alone"] * 3
    assert (tmp_path / "log").read_text().split() == ["1", "2", "3"]
    assert "the trial returns a score, not an Experiment" in str(result.explain())


def test_a_group_of_both_kinds() -> None:
    result = both(grid(lr=[0.1, 0.2], number=[False, True]), ("lr", "number"), trials.mixed)
    assert ways(result) == ["alone"] * 4


def test_members_fail_alone() -> None:
    over = grid(lr=0.1, start=[0, 99, 1])
    result = grid_search(trials.line, over, together=("start",))
    assert [trial.status for trial in result.trials] == ["done", "done", "failed"]
    assert {trial.how for trial in result.trials} == {"population of 3"}
    assert "ArithmeticError: too far" in str(result.trials[-1].error)
    unbuilt = grid_search(trials.line, grid(lr=[0.1, -1.0, 0.2]), together=("lr",))
    assert [trial.how for trial in unbuilt.trials] == ["population of 2"] * 2 + ["alone"]
    assert "lr must be a number" in str(unbuilt.trials[-1].error)


@pytest.mark.parametrize("broken", [0, 1, 3])
@pytest.mark.parametrize("place", ["loss", "source"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_member_whose_loss_or_source_raises_fails_alone(broken: int, place: str, workers: int) -> None:
    def trial(config: dict[str, Any]) -> ft.Experiment:
        def used(by: str, batch: torch.Tensor) -> torch.Tensor:
            if config["start"] == broken and by == place:
                raise RuntimeError("the disk is gone")
            return batch

        made = trials.line(config)
        grad = ft.grad(lambda params, batch: (used("loss", batch) - params["mean"]) ** 2)
        return replace(made, step=ft.step(grad, ft.optim.sgd(0.1)), train=made.train.map(lambda batch: used("source", batch)))

    result = grid_search(trial, grid(start=range(4)), together=("start",), workers=workers)
    assert ways(result) == ["alone"] + ["population of 3"] * 3
    last = result.trials[-1]
    assert (last.config, last.status) == ({"start": broken}, "failed")
    assert last.error is not None
    assert "in used" in last.error
    assert "RuntimeError: the disk is gone" in last.error
    assert all(trial.status == "done" for trial in result.trials[:3])
    assert "the disk is gone" in str(result.explain())


def test_a_member_that_diverges_is_last_and_leaves_the_others_alone() -> None:
    result = both(grid(lr=[0.1, 1e38, 0.2], start=2), ("lr",))
    assert result.trials[-1].config["lr"] == 1e38
    assert result.score < 1


def test_an_experiment_is_held_to_its_contract() -> None:
    for config, message in [({"score": "accuracy"}, "has score='accuracy', and evaluate gives 'distance'")]:
        result = grid_search(trials.line, [config | {"lr": lr} for lr in (0.1, 0.2)] + [{"lr": 0.1}], together=("lr",))
        failed = [trial for trial in result.trials if trial.status == "failed"]
        assert len(failed) == 2
        assert all(message in str(trial.error) for trial in failed)
    assert grid_search(trials.line, [{"score": None}]).trials[0].status == "done"


def test_only_what_is_left_is_grouped(tmp_path: Path) -> None:
    grid_search(trials.line, grid(lr=[0.1, 0.2]), together=("lr",), directory=tmp_path)
    result = grid_search(trials.line, grid(lr=[0.1, 0.2, 0.3, 0.4, 0.5]), together=("lr",), directory=tmp_path)
    assert ways(result) == ["population of 2"] * 2 + ["population of 3"] * 3
    assert type(result.state) is ft.State
    assert result.state.position.shape == ()


def test_prefetching_changes_nothing() -> None:
    results = [grid_search(trials.line, grid(lr=[0.1, 0.2], depth=depth), together=("lr",)) for depth in (0, 3)]
    scores = [[trial.score for trial in result.trials] for result in results]
    assert scores[0] == scores[1]
