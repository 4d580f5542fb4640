"""What a run of the benches leaves: RESULTS.md, results.json and a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.bounds import Bound
from bench.race import Result

HERE = Path(__file__).parent
PACKAGES = ("functrain", "torch", "jax", "optax", "opacus", "numpy", "h5py")


def line(row: Result) -> str:
    """A row as text, for who watches the run."""
    limit = "" if row.bound is None else f"; {_distance(row)} of its bound by {row.bound.by}"
    return f"{row.work} against {row.peer}: {_ratio(row)} ({_spread(row)}) {row.met}{limit}"


def write(results: Sequence[Result], notes: str) -> Path:
    """Write the table (with those of earlier runs of other benches), the numbers and the plot; returns the table's path."""
    rows = _merged(results)
    kept = [row._asdict() | {"bound": row.bound and row.bound._asdict()} for row in rows]
    (HERE / "results.json").write_text(json.dumps(kept, indent=1) + "\n")
    _plot(rows)
    path = HERE / "RESULTS.md"
    path.write_text(_text(rows, notes))
    return path


def _merged(results: Sequence[Result]) -> list[Result]:
    before = HERE / "results.json"
    kept = [_read(row) for row in json.loads(before.read_text())] if before.exists() else []
    run = {result.bench for result in results}
    return sorted([row for row in kept if row.bench not in run] + list(results), key=lambda row: row.bench)


def _read(row: dict[str, Any]) -> Result:
    return Result(**row | {"bound": Bound(**row["bound"]) if row.get("bound") else None})


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
        took = "" if row.ours_us is None else f"{row.ours_us:,.1f}"
        cells = (row.bench, row.work, row.peer, _ratio(row), _spread(row), goal, row.met, took)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Those with a goal:", "", "![ratios](results.png)", ""]
    return "\n".join([*lines, *_bounds(rows), *_robustness(), notes.strip(), ""])


def _ratio(row: Result) -> str:
    return "" if row.ratio is None else f"{row.ratio:.3f}"


def _spread(row: Result) -> str:
    return "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"


def _distance(row: Result) -> str:
    assert row.bound is not None
    assert row.ours_us is not None
    return f"{row.ours_us / row.bound.us:.2f}"


def _bounds(rows: Sequence[Result]) -> list[str]:
    """The table of what bounds each of our contestants: a row each, whoever it raced against."""
    bounded = {(row.bench, row.work): row for row in rows if row.bound is not None}
    if not bounded:
        return []
    lines = [
        "## What bounds them",
        "",
        "The least time that each need alone would take, at rates measured in the same run (the fastest of 20 turns):",
        "matrix products and convolutions at the rate of `torch.mm` of two 1024 × 1024 matrices; bytes read and written at the",
        "rate of negating numbers in place, as many as are at hand; dispatch by calls: a compiled call at the price of our",
        "compiled step with one number to update, any other for each operator that PyTorch dispatches (views included, a",
        "`_foreach` operator for each of its tensors), at the price of one on one number. The bound is the largest of the",
        "three; what is not compiled takes most of them one after the other.",
        "",
        "| bench | work | flops | bytes | dispatch | bound by | ours, µs | ours / bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in bounded.values():
        assert row.bound is not None
        needs = (
            f"{row.bound.flops / 1e6:,.1f} M: {row.bound.flops_us:,.0f} µs",
            f"{row.bound.bytes / 1e6:,.2f} MB: {row.bound.bytes_us:,.0f} µs",
            f"{row.bound.calls:,.3g}: {row.bound.calls_us:,.0f} µs",
        )
        cells = (row.bench, row.work, *needs, row.bound.by, f"{row.ours_us:,.0f}", _distance(row))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


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

    aimed = [(row, row.ratio, row.low, row.high, row.goal) for row in rows if row.ratio is not None and row.goal is not None]
    figure = Figure(figsize=(10, 0.3 * len(aimed) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, ratio, low, high, goal) in enumerate(aimed):
        axes.barh(place, ratio, color="tab:green" if ratio <= goal else "tab:red", height=0.6)
        axes.hlines(place, low or ratio, high or ratio, color="black", linewidth=1)
        axes.plot([goal] * 2, [place - 0.4, place + 0.4], color="black", linestyle=":")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(aimed)), [f"{row.work}\nvs {row.peer}" for row, *_ in aimed], fontsize=6)
    axes.set_ylim(-0.6, len(aimed) - 0.4)
    axes.invert_yaxis()
    axes.set_xlabel("time, ours / theirs (dotted: the goal; black: quartiles)")
    figure.savefig(HERE / "results.png", dpi=110)
