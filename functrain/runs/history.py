"""The history of a loop over steps: a row of measures every so many steps, in memory and on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, RunError
from functrain.core.step import Metrics
from functrain.core.tree import quoted
from functrain.engine.fold import position
from functrain.runs.best import Best
from functrain.runs.directory import Run
from functrain.runs.store import save_tree
from functrain.search.measures import measured

# Reading a number waits for the device: losses are kept as tensors, and read this many at a time.
_WAITING = 64


class History:
    """Goes along with a loop over `(state, metrics)` and takes down a row after every `every` steps.

    A row in `rows` is a dict of numbers: `steps` (seen by this history: k, 2k, …), `position` (of the state), `loss` (the plain
    mean of exactly the last k losses), `seconds` (since the loop began) and what `measure(state)` gives (as `measured.loss`
    where a row has such a name already). It is there before the loop's body runs for that step. Where steps are guarded, the
    losses of those that `ft.guard` has skipped are left out of the mean, and `skipped` counts them. A repeated step or a
    population counts as one step, with the mean of its losses.

    - `measure`: state → `{name: number}`, such as `{"accuracy": …}`;
    - `keep`: a `Best`, which is offered the state of each row with the number that is called as its `score`;
    - `directory`: each row is also appended to `metrics.jsonl` there, a JSON object a line, and the state of the newest row is
      `state.safetensors` (for `ft.load_tree`). Both are whole at any time.

    Raises `ArgumentError` for `every` below 1, a measure that gives anything but numbers by name, and a score that no row
    has; `RunError` for a directory with rows of another history, or when writing fails.

    Source: PrayTools.jl's `initevalcby`.

    >>> import functrain as ft
    >>> step = ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.sgd(0.25))
    >>> history = History(2, measure=lambda state: {"params": state.params})
    >>> for state, metrics in history(ft.fold(step, step.init(torch.tensor(0.0)), [torch.ones(1)] * 4)):
    ...     pass
    >>> [(row["steps"], row["loss"], row["params"]) for row in history.rows]
    [(2, 0.625, 0.75), (4, 0.0390625, 0.9375)]
    """

    def __init__(
        self,
        every: int,
        *,
        measure: Callable[[Any], Mapping[str, Any]] | None = None,
        directory: str | os.PathLike[str] | None = None,
        keep: Best | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be a number of steps of at least 1, got {every!r}")
        if measure is not None and not callable(measure):
            raise ArgumentError(f"measure is a function from a state to numbers by name, got {type(measure).__name__}")
        if keep is not None and not isinstance(keep, Best):
            raise ArgumentError(f"keep is a Best, such as ft.Best('accuracy'), got {type(keep).__name__}")
        self.every, self.measure, self.keep = every, measure, keep
        self.rows: list[dict[str, Any]] = []
        self.steps = 0
        self._losses = _Losses()
        self._begun: float | None = None
        self._directory = None if directory is None else _emptied(Path(directory))

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """The rows that a history has written to a directory; a last line that a kill has torn is left out."""
        return Run(directory, {}, {}).rows()

    def __call__(self, loop: Iterable[tuple[Any, Metrics]]) -> Iterator[tuple[Any, Metrics]]:
        """The same items one by one; steps are counted on from one loop to the next."""
        if self._begun is None:
            self._begun = time.perf_counter()
        for state, metrics in loop:
            self.steps += 1
            self._losses.add(metrics)
            if self.steps % self.every == 0:
                self._take_down(state, self._begun)
            yield state, metrics

    def _take_down(self, state: Any, begun: float) -> None:
        means, self._losses = self._losses.row(), _Losses()
        row = {"steps": self.steps, "position": position(state), **means, "seconds": time.perf_counter() - begun}
        row |= self._measures(state, row)
        if self.keep is not None and self.keep.score not in row:
            raise ArgumentError(f"keep has the score {self.keep.score!r}, and a row has {', '.join(quoted(row))}")
        self.rows.append(row)
        if self._directory is not None:
            save_tree(self._directory / "state.safetensors", state)
            Run(self._directory, {}, {}).log(row)
        if self.keep is not None:
            self.keep.offer(row[self.keep.score], state)

    def _measures(self, state: Any, row: Mapping[str, Any]) -> dict[str, float]:
        if self.measure is None:
            return {}
        try:
            found = measured(self.measure, state)
        except ArgumentError as error:
            error.add_note(f"in the measure of a History, at step {self.steps}")
            raise
        # ft.evaluate gives a loss as well.
        return {f"measured.{name}" if name in row else name: value for name, value in found.items()}

    def __repr__(self) -> str:
        return f"<History of {self.steps} steps: {len(self.rows)} rows, one every {self.every} steps>"


def _emptied(directory: Path) -> Path:
    """The directory, made if need be; `RunError` where there are rows of another history."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"could not make the directory {directory}: {error}") from error
    if (directory / "metrics.jsonl").exists():
        raise RunError(f"{directory} has the rows of a history or run already: choose another directory")
    return directory


class _Losses:
    """The losses since the last row, read from the device now and then."""

    def __init__(self) -> None:
        self.total, self.count, self.skipped = 0.0, 0, 0.0
        self.guarded = False
        self._waiting: list[tuple[Tensor, Tensor | None]] = []

    def add(self, metrics: Metrics) -> None:
        # Outside of any graph: otherwise those of all steps since the last row would stay alive.
        loss, skipped = metrics["loss"].detach(), metrics.get("skipped")
        alike = bool(self._waiting) and _kind(*self._waiting[-1]) == _kind(loss, skipped)
        if not alike or len(self._waiting) >= _WAITING:
            self._drain()
        self._waiting.append((loss, skipped))

    def row(self) -> dict[str, float]:
        self._drain()
        mean = self.total / self.count if self.count else math.nan
        return {"loss": mean} | ({"skipped": self.skipped} if self.guarded else {})

    def _drain(self) -> None:
        if not self._waiting:
            return
        losses = torch.stack([loss for loss, _ in self._waiting]).double()
        skips = [skipped for _, skipped in self._waiting if skipped is not None]
        self.guarded |= bool(skips)
        shares = torch.stack(skips).double() if skips else torch.zeros_like(losses)
        # A guard around repeated steps has skipped all of them, or none.
        shares = shares.reshape(*shares.shape, *(1,) * (losses.ndim - shares.ndim)).expand_as(losses)
        rows = (value.reshape(len(losses), -1) for value in (losses, shares))
        for values, left in zip(*(value.tolist() for value in rows)):
            good = [value for value, share in zip(values, left) if not share]
            self.total += math.fsum(good) / len(good) if good else 0.0
            self.count += bool(good)
            self.skipped += sum(left) / len(left)
        self._waiting = []


def _kind(loss: Tensor, skipped: Tensor | None) -> tuple[torch.Size, bool]:
    return loss.shape, skipped is None
