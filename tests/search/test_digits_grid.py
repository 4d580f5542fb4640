"""The example that searches a grid on the digits, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_grid.py"


def test_it_searches_as_populations_and_goes_on_where_it_was(tmp_path: Path) -> None:
    flags = ["--data", "data/digits.h5", "--directory", "search", "--epochs", "3"]
    command = [sys.executable, "-W", "error", str(EXAMPLE), *flags]
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    first, second = outputs
    assert first.count("population of 8") == 3
    assert "24/24" in first
    assert "kept from the journal: 24 trials" in second
    assert first.splitlines()[-1] == second.splitlines()[-1]
    best = json.loads((tmp_path / "search" / "best.json").read_text())
    assert best["score"] > 0.9
    assert first.splitlines()[-1].endswith(f"with test accuracy {best['score']:.4f}")
