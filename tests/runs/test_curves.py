"""Learning curves: a panel for each measure and a line for each split, whatever the rows lack."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.image import imread

from functrain.core.errors import ArgumentError, RunError
from functrain.runs.curves import curves, plot_curves


def rows_of(epochs: int) -> list[dict[str, Any]]:
    return [
        {"epoch": n, "position": 10 * n, "train/loss": 1 / n, "test/loss": 1.5 / n, "lr": 0.1, "seconds": 1.0}
        for n in range(1, epochs + 1)
    ]


def ink(path: Path, colour: tuple[int, int, int]) -> int:
    """How many pixels have this colour, nearly."""
    pixels = imread(path)[..., :3] * 255
    return int((numpy.abs(pixels - numpy.array(colour)) < 6).all(-1).sum())


BLUE, GREEN = (0x3B, 0x6F, 0xB6), (0x2C, 0x8C, 0x5A)


def test_measures_and_splits_are_told_apart() -> None:
    found = curves(rows_of(2))
    assert found == {
        "loss": {"train": ([1.0, 2.0], [1.0, 0.5]), "test": ([1.0, 2.0], [1.5, 0.75])},
        "lr": {"": ([1.0, 2.0], [0.1, 0.1])},
    }


def test_missing_keys_texts_and_flags_are_left_out() -> None:
    first = {"position": 5, "a": 1, "note": "x", "ok": True}
    rows = [first, {"position": 6}, {"a": 3, "position": 9, "b/c/d": 2}]
    assert curves(rows) == {"a": {"": ([5.0, 9.0], [1.0, 3.0])}, "c/d": {"b": ([9.0], [2.0])}}
    assert curves([{"a": 1}, {"a": 2}]) == {"a": {"": ([1.0, 2.0], [1.0, 2.0])}}


def test_the_picture_shows_the_lines(tmp_path: Path) -> None:
    plot_curves(rows_of(20), tmp_path / "c.png", title="digits $a_b$ {x}")
    height, width, _ = imread(tmp_path / "c.png").shape
    assert width > 1.5 * height
    assert ink(tmp_path / "c.png", BLUE) > 500
    assert ink(tmp_path / "c.png", GREEN) > 200
    assert [place.name for place in tmp_path.iterdir()] == ["c.png"]


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(1),
        [{"epoch": 1, "loss": math.nan}, {"epoch": 2, "loss": 0.5}, {"epoch": 3, "loss": math.inf}],
        [{"epoch": n, f"train/m{n % 7}": 10.0**n, "train/loss": 10.0**-n} for n in range(100)],
        [{"epoch": 1, "train/loss": 0.0}, {"epoch": 2, "test/accuracy": 0.5}],
    ],
)
def test_awkward_rows_make_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_curves(rows, tmp_path / "c.png")
    assert ink(tmp_path / "c.png", BLUE) > 10


def test_nothing_finite_is_said_in_the_picture(tmp_path: Path) -> None:
    plot_curves([{"epoch": 1, "train/loss": math.nan}], tmp_path / "c.png")
    assert imread(tmp_path / "c.png").std() > 0


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    for rows in ([], [{"epoch": 1, "seconds": 2.0}]):
        with pytest.raises(ArgumentError, match="no curves to draw"):
            plot_curves(rows, tmp_path / "c.png")
    with pytest.raises(RunError, match="could not write"):
        plot_curves(rows_of(2), tmp_path / "missing" / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_no_global_state_and_nothing_heavy_is_imported_early(tmp_path: Path) -> None:
    program = """
import sys
import functrain.runs
heavy = {"matplotlib", "cattrs", "tyro", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
functrain.runs.plot_curves([{"epoch": 1, "loss": 1.0}], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
print("fine")
"""
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "c.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
