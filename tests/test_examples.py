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
