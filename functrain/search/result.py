"""What a search found: the best config with its state, all trials in order, and how they were run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from functrain.core.explain import Stage
from functrain.core.tree import Tree
from functrain.search.grid import Config
from functrain.search.trial import Trial


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    - `best`: the config with the best score (of equal ones the first in declaration order); `score`;
    - `state`: what its trial gave as state, on the CPU, or None;
    - `trials`: all of them (of the directory, where there is one), best first, nan last, failed ones
      after that;
    - `table()`: the same as text; `explain()`: how each was run and why.
    """

    best: Config
    score: float
    state: Tree = field(repr=False)
    trials: list[Trial] = field(repr=False)
    stage: Stage = field(repr=False)

    def explain(self) -> Stage:
        """How the trials were run: alone or as populations, and the reasons."""
        return self.stage

    def table(self) -> str:
        """The trials, best first, in aligned columns: score, config, measures, seconds, and what failed."""
        configs = [_flat(trial.config) for trial in self.trials]
        names = list(dict.fromkeys(name for config in configs for name in config))
        measures = list(dict.fromkeys(name for trial in self.trials for name in trial.measures))
        rows = [["", "score", *names, *measures, "seconds", ""]]
        for number, (trial, config) in enumerate(zip(self.trials, configs), 1):
            row = [str(number), "-" if trial.status == "failed" else _cell(trial.score)]
            row += [_cell(config[name]) if name in config else "-" for name in names]
            row += [_cell(trial.measures[name]) if name in trial.measures else "-" for name in measures]
            rows.append([*row, f"{trial.seconds:.2f}", _remark(trial)])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths)) + f"  {row[-1]}".rstrip() for row in rows
        )


def _flat(config: Config, prefix: str = "") -> Config:
    flat: Config = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _remark(trial: Trial) -> str:
    if trial.error is None:
        return ""
    return f"failed: {last_line(trial.error)}"


def last_line(error: str) -> str:
    """The line of a traceback that says what was raised."""
    lines = [line for line in error.strip().splitlines() if line and not line.startswith(" ")]
    return lines[-1] if lines else "unknown"
