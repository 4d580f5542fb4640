"""The weather stations' files, from first look to forecasts, as a user runs it, only shorter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "examples" / "stations.py"
SMALL = ["--stations", "4", "--years", "0.4", "--epochs", "2", "--batch", "128", "--width", "64", "--no-compiled"]


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_forecasts_for_unseen_stations_beat_tomorrow_as_today(tmp_path: Path) -> None:
    output = run(PROGRAM, *SMALL, "--picture", "curves.png", cwd=tmp_path)
    assert "gzip" in output
    assert "direct" in output
    table = [line.split() for line in output.splitlines() if line[:5].strip().isdigit()]
    assert [int(row[0]) for row in table] == [1, 2]
    _, _, unseen, as_today, _ = map(float, table[-1])
    assert unseen < 0.8 * as_today
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Files that are there are read, and no others written.
    flags = [*SMALL, "--epochs", "1", "--stations", "9"]
    run("-m", "functrain.cli", "train", PROGRAM, *flags, cwd=tmp_path)
    (row,) = (tmp_path / "runs" / "stations-001" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(row)["test/persistence"] - as_today) < 0.01
    assert len(list((tmp_path / "data" / "stations").iterdir())) == 4
