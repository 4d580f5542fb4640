"""Searches as a user runs them: scores, failures, workers, directories, interruptions."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import trials

import functrain as ft
from functrain.core.errors import ArgumentError, FunctrainError, RunError
from functrain.search import Scored, grid, grid_search, nested
from functrain.search.keep import unpack

# --- scores ---


def test_the_best_is_first_and_ties_go_by_declaration() -> None:
    result = grid_search(trials.parabola, grid(x=[0, 2, 4, 3.5, 6]))
    assert [trial.config["x"] for trial in result.trials] == [3.5, 2, 4, 0, 6]
    assert (result.best, result.score, result.state) == ({"x": 3.5}, -0.25, None)
    least = grid_search(trials.parabola, grid(x=[0, 2, 6]), maximize=False)
    assert [trial.config["x"] for trial in least.trials] == [0, 6, 2]
    assert least.best == {"x": 0}


def test_ties_go_by_declaration_whichever_ends_first() -> None:
    first_may_end = threading.Event()

    def trial(config: dict[str, Any]) -> Scored:
        if config["x"] == 0:
            assert first_may_end.wait(60)
        else:
            first_may_end.set()
        return Scored(1.0, {"x": torch.tensor(config["x"])})

    result = grid_search(trial, grid(x=[0, 1]), workers=2)
    assert result.best == {"x": 0}
    assert int(result.state["x"]) == 0


def test_failures_are_recorded_nan_is_last_and_the_others_go_on() -> None:
    over = grid(does=["nan", "raise", "text"], x=1) | grid(does="score", x=[1, 2]) | grid(does="inf", x=0)
    result = grid_search(trials.unsteady, over)
    assert [trial.config["does"] for trial in result.trials] == ["inf", "score", "score", "nan", "raise", "text"]
    assert [trial.status for trial in result.trials] == ["done"] * 4 + ["failed"] * 2
    raised, text = result.trials[-2:]
    assert raised.error is not None
    assert "in unsteady" in raised.error
    assert "ValueError: no good: 1" in raised.error
    assert math.isnan(raised.score)
    assert text.error is not None
    assert "the score is '0.5' (str): a trial returns a number" in text.error
    table = result.table().splitlines()
    assert "failed: ValueError: no good: 1" in table[-2]
    assert len({line.index(" raise") + 6 for line in table[-2:-1]} | {table[0].index("does") + 4}) == 1


def test_when_all_fail_it_is_an_error_that_shows_one() -> None:
    with pytest.raises(FunctrainError, match=r"all 2 trials failed, .*ValueError: no good: 1"):
        grid_search(trials.unsteady, grid(does="raise", x=[1, 2]))


def test_measures_states_and_scores_of_every_numeric_kind() -> None:
    def trial(config: dict[str, Any]) -> Any:
        config["x"] = "the trial's own copy"
        return Scored(torch.tensor(0.5), {"w": torch.ones(2)}, {"loss": torch.tensor(2.0, dtype=torch.bfloat16)})

    result = grid_search(trial, [{"x": 1}])
    assert result.best == {"x": 1}
    assert (result.score, result.trials[0].measures, result.trials[0].how) == (0.5, {"loss": 2.0}, "alone")
    assert result.state["w"].tolist() == [1, 1]


def test_a_nested_grid_is_a_table_with_dotted_names() -> None:
    over = nested([("x", [1, 2]), [("opt", [grid(name="sgd", lr=0.1)])], []])
    lines = grid_search(trials.parabola, over).table().splitlines()
    assert lines[0].split() == ["score", "x", "opt.name", "opt.lr", "seconds"]
    assert lines[1].split()[:5] == ["1", "-1", "2", "sgd", "0.1"]
    assert lines[2].split()[:5] == ["2", "-1", "2", "-", "-"]
    assert not any(line != line.rstrip() for line in lines)


def test_progress_is_told_in_the_calling_thread() -> None:
    seen: list[tuple[int, int, float]] = []

    def progress(done: int, total: int, trial: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((done, total, trial.score))

    grid_search(trials.parabola, grid(x=range(5)), workers=2, progress=progress)
    assert [(done, total) for done, total, _ in seen] == [(place, 5) for place in range(1, 6)]
    assert {score for _, _, score in seen} == {0.0, -1.0, -4.0, -9.0}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"grid": []}, "no configs"),
        ({"grid": 3}, "made of configs"),
        ({"trial": 3}, "trial must be a function"),
        ({"workers": 0}, "workers must be an int"),
        ({"executor": 3}, "executor must be"),
        ({"maximize": "loss"}, "maximize must be"),
        ({"together": "x"}, r"together=\('x',\)"),
        ({"together": (3,)}, "together takes a tuple of names"),
        ({"together": ("lr",)}, "together names 'lr', and no config has it"),
    ],
)
def test_wrong_arguments(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        grid_search(**{"trial": trials.parabola, "grid": grid(x=[1, 2]), **keywords})


# --- directories ---


def test_a_second_call_runs_what_is_left(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "search"
    first = grid_search(trials.counted, grid(x=[1, 5], log=log), directory=folder)
    again = grid_search(trials.counted, grid(x=[1, 5], log=log), directory=folder)
    assert log.read_text().split() == ["1", "5"]
    assert again.trials == first.trials
    assert "kept from the journal: 2 trials" in str(again.explain())
    more = grid_search(trials.counted, grid(x=[5, 3, 1.0], log=log), directory=folder)
    assert log.read_text().split() == ["1", "5", "3", "1.0"]
    assert [trial.config["x"] for trial in more.trials] == [3, 1, 5, 1.0]
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [record["config"]["x"] for record in journal] == [1, 5, 3, 1.0]
    assert json.loads((folder / "best.json").read_text())["config"]["x"] == 3


def test_the_best_state_is_kept_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    seen: list[float] = []

    def progress(done: int, total: int, trial: Any) -> None:
        seen.append(float(unpack(file.read_bytes()).state["w"][0]))
        assert json.loads((tmp_path / "best.json").read_text())["config"]["x"] == seen[-1]

    grid_search(trials.kept, grid(x=[0, 5, 1, 3, 2]), directory=tmp_path, progress=progress)
    assert seen == [0, 5, 5, 3, 3]
    again = grid_search(trials.kept, grid(x=[3, 9]), directory=tmp_path)
    assert again.best == {"x": 3}
    assert again.state["w"].tolist() == [3, 3]
    assert again.state["half"].dtype == torch.bfloat16
    assert grid_search(trials.parabola, grid(x=3.0001), directory=tmp_path).state["w"].tolist() == [3, 3]


def test_a_better_trial_without_a_state_leaves_none_behind(tmp_path: Path) -> None:
    grid_search(trials.kept, grid(x=5), directory=tmp_path)
    assert grid_search(trials.parabola, grid(x=3), directory=tmp_path).state is None
    assert not (tmp_path / "best.safetensors").exists()
    assert json.loads((tmp_path / "best.json").read_text())["state"] is None


def test_a_trial_that_failed_is_left_to_be_done(tmp_path: Path) -> None:
    over = grid(x=[0, 1], flag=tmp_path / "flag")
    first = grid_search(trials.once, over, directory=tmp_path / "search")
    assert [trial.status for trial in first.trials] == ["done", "failed"]
    second = grid_search(trials.once, over, directory=tmp_path / "search")
    assert [trial.status for trial in second.trials] == ["done", "done"]
    assert second.best["x"] == 1


def test_scores_that_json_has_not_come_back(tmp_path: Path) -> None:
    over = grid(does=["nan", "inf", "score"], x=-1)
    first = grid_search(trials.unsteady, over, directory=tmp_path)
    second = grid_search(trials.unsteady, over, directory=tmp_path)
    assert [repr(trial.score) for trial in first.trials] == [repr(trial.score) for trial in second.trials]
    assert second.score == math.inf


def test_a_directory_ranks_one_way(tmp_path: Path) -> None:
    grid_search(trials.kept, grid(x=[1, 2]), directory=tmp_path)
    with pytest.raises(ArgumentError, match=r"maximize=True, .*False was asked for"):
        grid_search(trials.kept, grid(x=[1, 2]), directory=tmp_path, maximize=False)
    with pytest.raises(ArgumentError, match="cannot be ranked"):
        grid_search(trials.line, grid(lr=0.1), directory=tmp_path)


def test_damage_in_the_directory_is_named(tmp_path: Path) -> None:
    grid_search(trials.kept, grid(x=[1, 2]), directory=tmp_path)
    file = tmp_path / "best.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"could not read .*best\.safetensors"):
        grid_search(trials.kept, grid(x=[1, 2]), directory=tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"score": -4.0', '"score": "four"'))
    with pytest.raises(RunError, match="is damaged"):
        grid_search(trials.kept, grid(x=[1, 2]), directory=tmp_path)


def test_a_death_between_state_and_journal_loses_nothing(tmp_path: Path) -> None:
    whole = grid_search(trials.kept, grid(x=[1, 3]), directory=tmp_path)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for rest in (b"", lines[1][:20]):
        journal.write_bytes(lines[0] + rest)
        again = grid_search(trials.kept, grid(x=1), directory=tmp_path)
        assert again.trials == whole.trials
        assert again.state["w"].tolist() == [3, 3]
        assert journal.read_bytes().splitlines(keepends=True) == lines


def odd(config: dict[str, Any]) -> Scored:
    """States that are not for safetensors alone."""
    states = {
        "complex": {"w": torch.tensor([1 + 2j], dtype=torch.complex128)},
        "metadata": {"__metadata__": torch.ones(1)},
        "text": {"\ud800": torch.ones(1)},
        "plain": torch.zeros(1),
    }
    return Scored(config["x"], states[config["state"]])


def test_a_state_of_any_dtype_and_name_is_kept_and_one_that_cannot_be_fails_its_trial_alone(tmp_path: Path) -> None:
    for best, where in (("complex", tmp_path / "a"), ("metadata", tmp_path / "b"), ("plain", None)):
        over = grid(state=["text", "plain"], x=0) | grid(state=best, x=1)
        for _ in range(2):  # the second time from the directory
            result = grid_search(odd, over, directory=where)
            expected = odd({"state": best, "x": 1}).state
            assert all(map(torch.equal, ft.tree.leaves(result.state), ft.tree.leaves(expected)))
            assert ft.tree.same_structure(result.state, expected)
            assert [trial.status for trial in result.trials] == ["done", "done", "failed"]
            assert "not valid text" in (result.trials[-1].error or "")
