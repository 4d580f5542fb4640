"""Checkpoints: whole ones only, the newest whole one first, whatever happens to processes and files."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import functrain as ft
from functrain.core.errors import ArgumentError, DonatedError, RunError, TreeError
from functrain.runs.checkpoints import Checkpoints, damage


def state_of(position: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((50,), float(position)), "position": torch.tensor(position)}


LIKE = state_of(0)


def saved(folder: Path, *positions: int, keep: int | None = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for position in positions:
        checkpoints.save(state_of(position), position, {"epoch": position})
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir() if place.name != ".lock")


def test_the_newest_are_kept_and_come_back(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "deep" / "down", 10, 20, 30, 40)
    assert checkpoints.positions() == [20, 30, 40]
    assert names(checkpoints.folder) == ["step-00000020", "step-00000030", "step-00000040"]
    loaded = checkpoints.load(LIKE)
    assert (loaded.position, loaded.record, loaded.skipped) == (40, {"epoch": 40}, [])
    assert torch.equal(loaded.state["w"], state_of(40)["w"])
    assert checkpoints.load(LIKE, position=20).record == {"epoch": 20}
    assert saved(tmp_path / "all", 1, 2, 3, 4, 5, keep=None).positions() == [1, 2, 3, 4, 5]
    assert saved(tmp_path / "one", 1, 2, keep=1).positions() == [2]


def test_positions_are_numbers_not_names(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 99_999_999, 100_000_000, keep=2)
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.load(LIKE).position == 100_000_000
    checkpoints.save(state_of(100_000_001), 100_000_001, {})
    assert checkpoints.positions() == [100_000_000, 100_000_001]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_going_back_keeps_what_was_just_written(tmp_path: Path) -> None:
    assert saved(tmp_path, 30, 10, keep=1).positions() == [10]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (lambda place: flip(place / "state.safetensors"), "SHA-256"),
    "a cut state": (lambda place: os.truncate(place / "state.safetensors", 50), "has 50 bytes, expected"),
    "no state": (lambda place: (place / "state.safetensors").unlink(), "state.safetensors is missing"),
    "another record": (lambda place: (place / "record.json").write_text("{}"), "record.json has"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "manifest.json is missing"),
    "a cut manifest": (lambda place: os.truncate(place / "manifest.json", 30), "manifest.json"),
    "an empty manifest": (
        lambda place: (place / "manifest.json").write_text("{}"),
        "manifest.json is damaged",
    ),
    "a foolish manifest": (
        lambda place: (place / "manifest.json").write_text(
            '{"files": {"record.json": {}, "state.safetensors": 3}}'
        ),
        "cannot be read",
    ),
    "nothing left": (lambda place: [path.unlink() for path in place.iterdir()], "is missing"),
    "a file in its place": (lambda place: (shutil.rmtree(place), place.write_text("")), "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_seen_said_and_stepped_over(tmp_path: Path, kind: str) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    harm, says = DAMAGES[kind]
    harm(tmp_path / "step-00000020")
    loaded = checkpoints.load(LIKE)
    assert loaded.position == checkpoints.newest() == 10
    assert torch.equal(loaded.state["w"], state_of(10)["w"])
    assert len(loaded.skipped) == 1
    assert "step-00000020" in loaded.skipped[0]
    assert says in loaded.skipped[0]
    with pytest.raises(RunError, match="step-00000020"):
        checkpoints.load(LIKE, position=20)


def test_a_damaged_checkpoint_is_replaced_when_its_position_is_saved_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    flip(tmp_path / "step-00000020" / "state.safetensors")
    checkpoints.save(state_of(20), 20, {"epoch": 20})
    assert checkpoints.load(LIKE).position == 20
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_saving_the_same_again_changes_nothing_and_other_content_replaces(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    place = tmp_path / "step-00000010"
    before = place.stat().st_ino
    checkpoints.save(state_of(10), 10, {"epoch": 10})
    assert place.stat().st_ino == before
    checkpoints.save(state_of(10), 10, {"epoch": 11})
    assert checkpoints.load(LIKE).record == {"epoch": 11}
    assert names(tmp_path) == ["step-00000010"]


def test_a_kill_between_the_two_moves_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020").rename(tmp_path / ".replaced-step-00000020")
    (tmp_path / ".draft-step-00000020-0a1b").mkdir()
    assert checkpoints.positions() == [10, 20]
    assert checkpoints.load(LIKE).position == 20
    checkpoints.save(state_of(30), 30, {})
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]


def test_none_whole_is_an_error_that_lists_what_was_tried(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    flip(tmp_path / "step-00000010" / "record.json")
    flip(tmp_path / "step-00000020" / "state.safetensors")
    assert checkpoints.newest() is None
    with pytest.raises(RunError, match=r"step-00000020: state\.safetensors.*step-00000010: record\.json"):
        checkpoints.load(LIKE)
    with pytest.raises(RunError, match="only of 10, 20"):
        checkpoints.load(LIKE, position=15)
    with pytest.raises(RunError, match="no checkpoint in"):
        Checkpoints(tmp_path / "nowhere").load(LIKE)
    assert Checkpoints(tmp_path / "nowhere").newest() is None


def test_a_changed_program_is_not_taken_for_damage(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match="'w': expected"):
        saved(tmp_path, 10, 20).load({**LIKE, "w": torch.zeros(7)})


def test_what_cannot_be_saved_leaves_what_there_was(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    with pytest.raises(TreeError, match="is float"):
        checkpoints.save({"w": 3.0}, 20, {})
    with pytest.raises(ArgumentError, match="is object"):
        checkpoints.save(state_of(20), 20, {"what": object()})
    for position in (-1, True, 2.0):
        with pytest.raises(ArgumentError, match="position must be an int"):
            checkpoints.save(LIKE, position, {})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="keep must be"):
        Checkpoints(tmp_path, keep=0)
    assert names(tmp_path) == ["step-00000010"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not write"):
        Checkpoints(tmp_path / "file").save(LIKE, 1, {})


def test_a_state_of_a_real_step_and_one_that_was_donated(tmp_path: Path) -> None:
    def loss(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return (batch @ params["w"]) ** 2

    step = ft.step(ft.grad(loss), ft.optim.sgd(0.1, momentum=0.9), donate=True)
    old = step.init({"w": torch.ones(2)})
    new, _ = step(old, torch.ones(4, 2))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(DonatedError, match="donat"):
        checkpoints.save(old, 0, {})
    checkpoints.save(new, 1, {})
    loaded = checkpoints.load(step.init({"w": torch.ones(2)})).state
    assert type(loaded) is type(new)
    assert ft.runs.hash_tree(loaded) == ft.runs.hash_tree(new)


def test_threads_that_save_to_one_folder_do_not_harm_each_other(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=saved, args=(tmp_path, *range(start, 24, 4)), kwargs={"keep": None})
        for start in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.positions() == list(range(24))
    assert [damage(tmp_path / name) for name in names(tmp_path)] == [None] * 24


SAVER = """
import sys, torch
from functrain.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
while True:
    for position in range(1000000):
        # Every position twice with other content, so that replacing is interrupted too.
        for turn in range(2):
            state = {"w": torch.full((20000,), float(position)), "turn": torch.tensor(turn)}
            checkpoints.save(state, position, {"turn": turn})
        print(position, flush=True)
"""


def test_a_kill_while_saving_always_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    like = {"w": torch.zeros(20000), "turn": torch.tensor(0)}
    moment = random.Random(0)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, os.fspath(folder)], stdout=subprocess.PIPE, text=True
        ) as saver:
            assert saver.stdout is not None
            done = -1
            try:
                for _ in range(3 + attempt):
                    done = int(saver.stdout.readline())
                # Not to wait for anything: to hit another place of the saves that go on meanwhile.
                threading.Event().wait(moment.random() * 0.01)
            finally:
                saver.send_signal(signal.SIGKILL)
            later = [int(line) for line in saver.stdout.read().split()]
        done = max([done, *later])
        checkpoints = Checkpoints(folder, keep=2)
        loaded = checkpoints.load(like)
        assert loaded.skipped == []
        assert loaded.position in (done, done + 1)
        assert torch.equal(loaded.state["w"], torch.full((20000,), float(loaded.position)))
        assert loaded.state["turn"].item() == loaded.record["turn"]
        checkpoints.save(like, 10**6, {})
        assert all(name.startswith("step-") for name in names(folder))


def test_a_record_of_numbers_that_are_not_finite_comes_back_as_numbers(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    record = {"sums": {"high": math.inf, "low": [-math.inf, 0.5]}, "note": "fine"}
    checkpoints.save({"w": torch.ones(1)}, 1, record | {"gone": math.nan})
    loaded = checkpoints.load({"w": torch.ones(1)}).record
    assert math.isnan(loaded.pop("gone"))
    assert loaded == record
