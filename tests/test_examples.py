"""Every example is run as a user runs it, only shorter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_digits_reaches_its_accuracy_compiled(tmp_path: Path) -> None:
    output = run("-m", "functrain.cli", "train", EXAMPLES / "digits.py", "--epochs", "15", cwd=tmp_path)
    assert "one graph" in output
    assert "fused" in output
    assert rows(tmp_path / "runs" / "digits-001")[-1]["test/accuracy"] >= 0.97


def test_characters_learns_from_its_own_standard_library(tmp_path: Path) -> None:
    flags = ["--characters", "60000", "--epochs", "2", "--width", "64"]
    run("-m", "functrain.cli", "train", EXAMPLES / "characters.py", *flags, cwd=tmp_path)
    first, last = rows(tmp_path / "runs" / "characters-001")
    assert last["valid/loss"] < first["valid/loss"] < 4.852  # log(128): guessing


def test_batchnorm_has_the_same_bits_whoever_does_the_work(tmp_path: Path) -> None:
    output = run(EXAMPLES / "batchnorm.py", "--epochs", "2", cwd=tmp_path)
    assert "not additive over parts" in output
    table = [line.split() for line in output.splitlines() if line.startswith(("loop", "threads,"))]
    assert [row[:2] for row in table[1:]] == [["threads,", workers] for workers in "1238"]
    assert len({tuple(row[-3:]) for row in table}) == 1
    assert float(table[0][-1]) > 0.8
    assert "the same bits, whoever did the work" in output


def test_reducers_survive_broken_workers_where_the_mean_does_not(tmp_path: Path) -> None:
    flags = ["--epochs", "5", "--picture", "curves.png", "--reducers", "mean", "multi-Krum", "sign vote"]
    output = run(EXAMPLES / "reducers.py", *flags, cwd=tmp_path)
    found = {line[:18].strip(): float(line[18:32]) for line in output.splitlines()[1:4]}
    assert found["mean"] < 0.7 < 0.85 < min(found["multi-Krum"], found["sign vote"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_private_learns_and_spends_its_budget_step_by_step(tmp_path: Path) -> None:
    flags = ["--epochs", "6", "--epsilon", "6", "--batch", "256"]
    run("-m", "functrain.cli", "train", EXAMPLES / "private.py", *flags, cwd=tmp_path)
    epochs = rows(tmp_path / "runs" / "private-001")
    spent = [row["epsilon"] for row in epochs]
    assert spent == sorted(set(spent))
    assert 5.9 < spent[-1] <= 6
    assert epochs[-1]["test/accuracy"] > 0.7
