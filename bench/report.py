"""What a run of the benches leaves: RESULTS.md, results.json and a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.race import Result

HERE = Path(__file__).parent
PACKAGES = ("functrain", "torch", "jax", "optax", "opacus", "numpy", "h5py")


def write(results: Sequence[Result], notes: str) -> Path:
    """Write the table (with those of earlier runs of other benches), the numbers and the plot; returns the table's path."""
    rows = _merged(results)
    (HERE / "results.json").write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    _plot(rows)
    path = HERE / "RESULTS.md"
    path.write_text(_text(rows, notes))
    return path


def _merged(results: Sequence[Result]) -> list[Result]:
    before = HERE / "results.json"
    kept = [Result(**row) for row in json.loads(before.read_text())] if before.exists() else []
    run = {result.bench for result in results}
    return sorted([row for row in kept if row.bench not in run] + list(results), key=lambda row: row.bench)


def _text(rows: Sequence[Result], notes: str) -> str:
    lines = [
        "# Results",
        "",
        "Written by `python -m bench`. Ratio: our time / the peer's on the same work, contestants interleaved in one",
        "process; the median over the rounds, with quartiles; below 1 ours is faster. A time by itself means little on a",
        "shared machine.",
        "",
        f"Machine: {_machine()}. Versions: Python {platform.python_version()}, {_versions()}.",
        "",
        "| bench | work | against | ratio | quartiles | goal | reached | ours, µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"≤ {row.goal:.2f}"
        spread = f"{row.low:.3f} to {row.high:.3f}"
        cells = (row.bench, row.work, row.peer, f"{row.ratio:.3f}", spread, goal, row.met, f"{row.ours_us:,.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![ratios](results.png)", "", *_robustness(), notes.strip(), ""])


def _robustness() -> list[str]:
    """The table of bench `robust`: a row a reducer, a column an attack."""
    path = HERE / "robust.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    attacks = list(next(iter(found["accuracy"].values())))
    lines = ["## Robustness", "", found["setting"], "", f"| reducer | {' | '.join(attacks)} |", "|---|" + "---|" * len(attacks)]
    for reducer, row in found["accuracy"].items():
        lines.append(f"| {reducer} | {' | '.join(f'{row[attack]:.3f}' for attack in attacks)} |")
    return [*lines, ""]


def _machine() -> str:
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {platform.system()} {platform.machine()}, no GPU used"


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def _plot(rows: Sequence[Result]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.4 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    colours = ["tab:gray" if row.goal is None else "tab:green" if row.ratio <= row.goal else "tab:red" for row in rows]
    axes.barh(places, [row.ratio for row in rows], color=colours, height=0.6)
    axes.hlines(places, [row.low for row in rows], [row.high for row in rows], color="black", linewidth=1)
    for place, row in zip(places, rows):
        if row.goal is not None:
            axes.plot([row.goal] * 2, [place - 0.4, place + 0.4], color="black", linestyle=":")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{row.work}\nvs {row.peer}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time, ours / theirs (dotted: the goal; black: quartiles)")
    figure.savefig(HERE / "results.png", dpi=110)
