"""Learning curves: rows of metrics as a picture, one panel for each measure."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from functrain.core.errors import ArgumentError, MissingExtraError
from functrain.runs.store import whole_file

# One colour for a split wherever it appears; blue, orange and green that colour-blind readers tell apart.
_COLOURS = {"train": "#3b6fb6", "valid": "#e08214", "test": "#2c8c5a"}
_OTHERS = ("#8e5aa8", "#b5404a", "#4d4d4d")
_AXES = ("epoch", "position")
_CLOCKS = ("seconds", "time")

Curve = tuple[list[float], list[float]]


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """The curves in `rows`: for each measure and split, where it was measured and what it was.

    A key "train/loss" is the measure `loss` on the split `train`; a key without "/" is a measure of its own.
    The place is the row's `epoch`, else its `position`, else its number. Keys that a row lacks are left out,
    and so are texts and clocks.

    >>> curves([{"epoch": 1, "train/loss": 0.9, "lr": 0.1}, {"epoch": 2, "train/loss": 0.5}])
    {'loss': {'train': ([1.0, 2.0], [0.9, 0.5])}, 'lr': {'': ([1.0], [0.1])}}
    """
    table = list(rows)
    axis = _axis(table)
    found: dict[str, dict[str, Curve]] = {}
    for number, row in enumerate(table, 1):
        place = row.get(axis) if axis else number
        if place is None:
            continue
        for key, value in row.items():
            if key in _AXES + _CLOCKS or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            split, slash, measure = key.partition("/")
            lines = found.setdefault(measure if slash else key, {})
            xs, ys = lines.setdefault(split if slash else "", ([], []))
            xs.append(float(place))
            ys.append(float(value))
    return found


def plot_curves(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the learning curves in `rows` (see `curves`) as a PNG file: a panel a measure, a line a split.

    Values that are not finite leave a gap. Raises `ArgumentError` when there is nothing to draw, and
    `MissingExtraError` without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_curves([{"epoch": 1, "train/loss": 0.5, "test/loss": 0.6}], f"{folder}/curves.png")
    """
    try:
        # Not pyplot: it keeps every figure and the choice of a backend in global state.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "plots", "drawing learning curves") from error
    table = list(rows)
    found = curves(table)
    if not found:
        raise ArgumentError("no curves to draw: expected rows with numbers under keys such as 'train/loss'")
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    size = (4.2 * columns, 3.1 * lines + (0.4 if title else 0))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, (measure, splits) in zip(panels, found.items()):
        _draw(panel, measure, splits, _axis(table) or "row")
    for panel in list(figure.axes)[len(found) :]:
        panel.remove()
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _axis(table: list[Mapping[str, Any]]) -> str | None:
    return next((axis for axis in _AXES if any(axis in row for row in table)), None)


def _draw(panel: Any, measure: str, splits: dict[str, Curve], axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    spare = iter(_OTHERS * len(splits))
    finite = [value for _, ys in splits.values() for value in ys if math.isfinite(value)]
    for split, (xs, ys) in splits.items():
        heights = [y if math.isfinite(y) else math.nan for y in ys]
        colour = _COLOURS.get(split) or (_COLOURS["train"] if not split else next(spare))
        # A single point is no line, and a curve of many points needs no marks.
        marker = "o" if len(xs) <= 30 else None
        panel.plot(xs, heights, color=colour, label=split, linewidth=1.7, marker=marker, markersize=3.2)
    panel.set_title(measure, fontsize=10, parse_math=False)
    panel.set_xlabel(axis, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    panel.grid(color="#e3e3e3", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if "loss" in measure and finite and min(finite) > 0 and max(finite) / min(finite) > 200:
        panel.set_yscale("log")
    if any(splits):
        panel.legend(fontsize=8, frameon=False)
    if not finite:
        panel.set_xticks([])
        panel.set_yticks([])
        middle = {"transform": panel.transAxes, "ha": "center", "va": "center"}
        panel.text(0.5, 0.5, "no finite value", color="#777777", **middle)
