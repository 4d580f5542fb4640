"""The adversarial example, run as a user runs it, only shorter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "adversarial.py"


def test_the_generator_comes_closer_to_the_ring(tmp_path: Path) -> None:
    flags = ["--steps", "150", "--picture", "ring.png"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == [str(step) for step in range(0, 151, 15)]
    distances = [float(row[-2]) for row in rows]
    # Two samples of the data are about 0.002 apart, up or down.
    assert distances[0] > 0.4
    assert distances[-1] < 0.06
    assert min(float(row[1]) for row in rows[1:]) > 0.5, "the discriminator should not win"
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")
