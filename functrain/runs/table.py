"""A table that grows by a line: metrics in aligned columns, as text, for terminals and logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# "-1.234e-05", the longest number of four significant digits, has ten characters.
_WIDTH = 10
_CLOCKS = ("seconds", "time")


@dataclass(frozen=True)
class Table:
    """A table with the given columns, of which `header()` and `row(values)` give one line each.

    Lines of a table have one length and no line end. Numbers have four significant digits, accuracies four
    places, `seconds` one; what a row does not have is a dash.

    >>> table = Table(["epoch", "train/loss", "test/accuracy", "seconds"])
    >>> print(table.header())
         epoch  train/loss  test/accuracy     seconds
    >>> print(table.row({"epoch": 1, "train/loss": 0.123456, "test/accuracy": 0.9731, "seconds": 3.21}))
             1      0.1235         0.9731        3.2s
    >>> print(table.row({"epoch": 2, "train/loss": float("nan")}))
             2         nan              -           -
    """

    columns: Sequence[str]

    def header(self) -> str:
        """The names of the columns, as one line."""
        return self._line(list(self.columns))

    def row(self, values: Mapping[str, Any]) -> str:
        """One line of `values` by column; keys that are no column are left out."""
        return self._line([cell(name, values.get(name)) for name in self.columns])

    def _line(self, cells: list[str]) -> str:
        widths = [max(_WIDTH, len(name)) for name in self.columns]
        return "  ".join(_fitted(text, width) for text, width in zip(cells, widths))


def _fitted(text: str, width: int) -> str:
    return text.rjust(width) if len(text) <= width else text[: width - 1] + "…"


def cell(name: str, value: Any) -> str:
    """The text of one value in the column `name`; 0-d tensors are read as numbers.

    >>> cell("lr", 0.00025), cell("test/accuracy", 1.0), cell("seconds", 83.4), cell("position", 12000)
    ('0.00025', '1.0000', '83.4s', '12000')
    """
    if value is None:
        return "-"
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        text = str(value)
        return text if len(text) <= _WIDTH else f"{value:.3e}"
    measure = name.rpartition("/")[2]
    if not math.isfinite(value):
        return str(value)
    if measure in _CLOCKS:
        return f"{value:.1f}s"
    if measure.endswith("accuracy"):
        return f"{value:.4f}"
    return f"{value:.4g}"
