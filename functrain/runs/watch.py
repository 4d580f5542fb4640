"""What a person sees of a run: a line an epoch in columns, and a progress bar while it goes."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from functrain.core.errors import MissingExtraError
from functrain.runs.events import EpochEnded, Event, Started, Stepped
from functrain.runs.table import Table


class Watch:
    """An observer that prints: use it as a context manager, and hand it to `train`.

    On a terminal it shows a bar with the steps of the epoch and the time left; anywhere else only a line an epoch.
    Quiet, it prints nothing but warnings of damaged checkpoints.

    >>> with Watch(quiet=True) as watch:
    ...     watch(Started(0, 10, 5, []))
    """

    def __init__(self, quiet: bool = False) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError as error:
            raise MissingExtraError.of("rich", "cli", "showing progress") from error
        self.quiet = quiet
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar: Any = Progress(*columns, console=self._console, transient=True, disable=quiet or not sys.stdout.isatty())
        self._task: Any = None
        self._table: Table | None = None
        self._length = 1

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a text above the bar, unless quiet."""
        if not self.quiet:
            self._console.print(text)

    def interrupting(self) -> None:
        """Say that the run ends after this step; safe to call from a signal handler."""
        if not self.quiet:
            os.write(2, b"\ninterrupted: stopping after this step; once more to stop at once\n")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._begin(event)
        elif isinstance(event, Stepped):
            self._bar.update(self._task, completed=(event.position - 1) % self._length + 1, total=self._length)
        elif isinstance(event, EpochEnded):
            self._row(event.row)

    def _begin(self, event: Started) -> None:
        for skipped in event.skipped:
            self._console.print(f"damaged checkpoint passed over: {skipped}")
        if event.position:
            self.say(f"resumed at step {event.position} of {event.steps}")
        self._length = max(1, event.steps_per_epoch)
        self._task = self._bar.add_task("epoch", total=self._length, completed=event.position % self._length)

    def _row(self, row: dict[str, Any]) -> None:
        if self._table is None:
            self._table = Table([name for name in row if name != "position"])
            self.say(self._table.header())
        self.say(self._table.row(row))
