"""The population of learning rates, run as a user runs it, only shorter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "examples" / "population.py"


def test_a_population_finds_the_rates_that_the_range_test_suggests(tmp_path: Path) -> None:
    flags = ["--members", "9", "--steps", "80", "--every", "20", "--picture", "rates.png"]
    done = subprocess.run([sys.executable, PROGRAM, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:11]]
    accuracies = {float(row[0]): float(row[2]) for row in rows if row[1] != "suggested"}
    (suggested,) = (float(row[0]) for row in rows if row[1] == "suggested")
    assert len(accuracies) == 9
    assert accuracies == dict(sorted(accuracies.items()))
    best = max(accuracies.values())
    assert best > 0.9
    assert accuracies[1e-4] < best - 0.1
    assert accuracies[1.0] < best - 0.3
    nearest = min(accuracies, key=lambda rate: max(rate / suggested, suggested / rate))
    assert accuracies[nearest] > best - 0.05
    assert [row[0] for row in rows if row[-1] == "best"] == [f"{rate:.2e}" for rate in accuracies if accuracies[rate] == best][
        :1
    ]
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
