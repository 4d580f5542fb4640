"""Run directories: made once, found again, never a stranger's, and a log that survives a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from functrain.core.errors import ArgumentError, RunError
from functrain.runs.directory import Run

CONFIG = {"lr": 0.1, "widths": [8, 8]}
FACTS = {"python": "3.11", "program": {"path": "digits.py", "sha256": "0"}}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_found_again_as_it_was_made(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs" / "first", CONFIG, FACTS)
    run.checkpoints.save({"w": torch.ones(2)}, 5, {})
    again = Run.open(tmp_path / "runs" / "first")
    assert (again.config, again.facts, again.rows()) == (CONFIG, FACTS, [])
    assert (run.config, run.facts, run.rows()) == (CONFIG, FACTS, [])
    assert again.checkpoints.positions() == [5]
    assert json.loads((run.path / "config.json").read_text()) == CONFIG


def test_an_empty_directory_becomes_a_run_and_a_run_is_not_made_twice(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    run.log({"position": 1})
    before = files(tmp_path)
    with pytest.raises(RunError, match=r"choose another --run, .*functrain resume .*--overwrite"):
        Run.create(tmp_path, {}, {})
    assert files(tmp_path) == before


def test_overwriting_starts_anew(tmp_path: Path) -> None:
    old = Run.create(tmp_path, CONFIG, FACTS)
    old.log({"position": 1})
    old.checkpoints.save({"w": torch.ones(2)}, 5, {})
    (tmp_path / "curves.png").write_text("old")
    new = Run.create(tmp_path, {"lr": 1.0}, {}, overwrite=True)
    assert (new.config, new.facts, new.rows(), new.checkpoints.positions()) == ({"lr": 1.0}, {}, [], [])
    assert sorted(place.name for place in tmp_path.iterdir()) == [
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "run.json",
    ]
    assert Run.create(tmp_path / "new", CONFIG, {}, overwrite=True).config == CONFIG


@pytest.mark.parametrize("name", ["thesis.txt", "run.json", "config.json", ".git"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_strangers_directory_is_never_touched(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text('{"kind": "marathon"}')
    before = files(tmp_path)
    with pytest.raises(RunError, match="not a run of functrain"):
        Run.create(tmp_path, CONFIG, FACTS, overwrite)
    assert files(tmp_path) == before
    with pytest.raises(RunError, match="no run at"):
        Run.open(tmp_path)


def test_overwriting_does_not_follow_links_out_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits.h5").write_text("precious")
    run = Run.create(tmp_path / "run", CONFIG, FACTS)
    (run.path / "data").symlink_to(tmp_path / "data")
    Run.create(run.path, CONFIG, FACTS, overwrite=True)
    assert (tmp_path / "data" / "digits.h5").read_text() == "precious"


def test_what_is_no_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such directory"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="no such directory"):
        Run.open(tmp_path / "file")
    with pytest.raises(RunError, match="is a file"):
        Run.create(tmp_path / "file", CONFIG, FACTS, overwrite=True)
    with pytest.raises(RunError, match="could not create"):
        Run.create(tmp_path / "file" / "below", CONFIG, FACTS)
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match=r"has no run\.json"):
        Run.open(tmp_path / "other")
    Run.create(tmp_path / "half", CONFIG, FACTS)
    (tmp_path / "half" / "config.json").unlink()
    with pytest.raises(RunError, match=r"config\.json"):
        Run.open(tmp_path / "half")
    assert Run.create(tmp_path / "half", CONFIG, FACTS, overwrite=True).config == CONFIG


def test_what_a_kill_leaves_at_the_very_start_is_still_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123")
    (tmp_path / ".run.json.0a1b2c3d.tmp").write_text("{")
    assert Run.create(tmp_path, CONFIG, FACTS).config == CONFIG


def test_text_in_a_config_stays_text(tmp_path: Path) -> None:
    Run.create(tmp_path, {"name": "inf", "tags": ["nan"]}, {"host": "nan"})
    run = Run.open(tmp_path)
    assert (run.config, run.facts) == ({"name": "inf", "tags": ["nan"]}, {"host": "nan"})


def test_facts_that_json_cannot_hold_make_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"facts\['x'\] is object"):
        Run.create(tmp_path / "run", CONFIG, {"x": object()})
    assert not (tmp_path / "run").exists()


# --- the log ------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    rows = [
        {"position": 1, "loss": 0.1 + 0.2, "note": "zwei\nZeilen \u2028 ü"},
        {"position": 2, "loss": math.inf, "low": -math.inf, "all": [1, None, True, {"a": math.inf}]},
        {"position": 2**60, "loss": 1e-308},
    ]
    for row in rows:
        run.log(row)
    run.log({"position": torch.tensor(3), "loss": torch.tensor(0.1), "gone": math.nan})
    assert run.rows()[:3] == Run.open(tmp_path).rows()[:3] == rows
    assert run.rows()[3]["loss"] == torch.tensor(0.1).item()
    assert math.isnan(run.rows()[3]["gone"])
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("row", [{}, {"position": 1.0}, {"position": True}, {"position": "1"}])
def test_a_row_without_a_position_is_refused(tmp_path: Path, row: dict[str, object]) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    with pytest.raises(ArgumentError, match="integer 'position'"):
        run.log(row)
    assert run.rows() == []


def test_every_torn_last_line_is_ignored_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    run.log({"position": 1})
    run.log({"position": 2, "loss": 0.25})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        assert run.rows() == [{"position": 1}]
        run.log({"position": 3})
        assert run.rows() == [{"position": 1}, {"position": 3}]
        path.write_bytes(whole[:size])
        run.truncate(5)
        assert path.read_bytes() == whole[:first]


@pytest.mark.parametrize("line", ["{", "[1]", "", "\0\0\0"])
def test_damage_inside_the_log_is_said(tmp_path: Path, line: str) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    (tmp_path / "metrics.jsonl").write_text('{"position": 1}\n' + line + '\n{"position": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is damaged"):
        run.rows()


def test_truncating_takes_the_log_back_to_a_position(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    for position in (10, 20, 20, 30):
        run.log({"position": position, "loss": math.nan, "é": 0.1})
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    run.truncate(20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    run.truncate(0)
    assert run.rows() == []
    (tmp_path / "metrics.jsonl").unlink()
    assert run.rows() == []
    run.log({"position": 1})
    assert run.rows() == [{"position": 1}]


# --- two processes ------------------------------------------------------------------------------------------

TRAIN = """
import sys
from functrain.runs.directory import Run
run = Run.open(sys.argv[1])
with run.locked():
    position = 0
    while True:
        position += 1
        run.log({"position": position, "text": "x" * 3000})
        print(position, flush=True)
"""


def test_one_process_trains_in_a_run_and_a_kill_frees_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG, FACTS)
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN, os.fspath(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        try:
            trainer.stdout.readline()
            with pytest.raises(RunError, match=f"process .id {trainer.pid}."), run.locked():
                pass
            with pytest.raises(RunError, match="in use"):
                Run.create(tmp_path, CONFIG, FACTS, overwrite=True)
        finally:
            trainer.send_signal(signal.SIGKILL)
        said = [int(line) for line in trainer.stdout.read().split()]
    rows = Run.open(tmp_path).rows()
    assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= max(said, default=1)
    with run.locked():
        run.log({"position": len(rows) + 1})
    assert len(run.rows()) == len(rows) + 1
    with run.locked(), pytest.raises(RunError, match="in use"), Run.open(tmp_path).locked():
        pass
