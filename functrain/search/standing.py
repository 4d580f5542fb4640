"""How a search stands: its trials and the best state so far, in memory and, given a directory, on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from functrain.core.errors import ArgumentError, RunError
from functrain.core.tree import Tree
from functrain.search.canonical import config_key
from functrain.search.journal import Journal, Record
from functrain.search.keep import pack, unpack, write_whole
from functrain.search.trial import Outcome, Trial

_RECORD = "record"


class Standing:
    """Trials by key, the best of them, and its state.

    What reaches the disk does so in an order that a death at any moment leaves whole: the best state
    (which carries its trial's record along), then the journal's line, then `best.json`, which says again
    what the other two hold.
    """

    def __init__(self, maximize: bool | None, journal: Journal | None) -> None:
        self.asked, self.maximize = maximize, maximize
        self.trials: dict[str, Trial] = {}
        self.best: str | None = None
        self.state: Tree = None
        self._journal = journal
        if journal is not None:
            self._recall(journal)

    def add(self, outcome: Outcome) -> None:
        """Take a finished trial in, and put it on disk."""
        trial, state = outcome.trial, outcome.state
        key = config_key(trial.config)
        if trial.status == "done":
            self._direct(outcome.maximize)
        better = trial.status == "done" and (self.best is None or self._rank(trial) < self._rank(self.trials[self.best]))
        if self._journal is not None:
            record = _record(key, trial, self.maximize if trial.status == "done" else None)
            if better and state is not None:
                write_whole(self._state_file, pack(state, {_RECORD: json.dumps(record)}))
            self._journal.append(record)
        self.trials.pop(key, None)
        self.trials[key] = trial
        if better:
            self.best, self.state = key, state
            self._show()

    def sorted(self) -> list[Trial]:
        """All trials, best first; those that failed last."""
        return sorted(self.trials.values(), key=self._rank)

    def finished(self, key: str) -> bool:
        """Whether a config need not be run again: a trial that failed is not finished."""
        return key in self.trials and self.trials[key].status == "done"

    def _rank(self, trial: Trial) -> tuple[bool, bool, float, int]:
        # Equal scores rank by their places in the grid; equal places (of two grids) stay in the journal's
        # order.
        if trial.status != "done" or math.isnan(trial.score):
            return (trial.status != "done", True, 0.0, trial.place)
        return (False, False, trial.score if self.maximize is False else -trial.score, trial.place)

    def _direct(self, maximize: bool | None) -> None:
        wanted = self.asked if self.asked is not None else True if maximize is None else maximize
        if self.maximize is not None and self.maximize != wanted:
            raise ArgumentError(
                f"this trial has maximize={wanted}, trials before it have {self.maximize}: scores of "
                "both kinds cannot be ranked; pass maximize=… to grid_search, or take another directory"
            )
        self.maximize = wanted

    # --- on disk ---

    @property
    def _state_file(self) -> Path:
        assert self._journal is not None
        return self._journal.directory / "best.safetensors"

    def _recall(self, journal: Journal) -> None:
        for key, record in journal.records.items():
            self._take(key, record)
        packed = None
        if self._state_file.exists():
            packed = unpack(self._state_file.read_bytes(), str(self._state_file))
            record = json.loads(packed.texts[_RECORD])
            if not self.finished(record["key"]):
                # The search died between the state and the journal's line: the record is in the state's file.
                journal.append(record)
                self._take(record["key"], record)
        done = [key for key in self.trials if self.finished(key)]
        self.best = min(done, key=lambda key: self._rank(self.trials[key]), default=None)
        if packed is not None and json.loads(packed.texts[_RECORD])["key"] == self.best:
            self.state = packed.state
        if self.best is not None:
            self._show()

    def _take(self, key: str, record: Record) -> None:
        try:
            trial, maximize = _trial(record)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"the journal's record of {key} is damaged ({error!r}): remove its line") from error
        if maximize is not None:
            if self.asked is not None and self.asked != maximize:
                raise ArgumentError(
                    f"the search in this directory has maximize={maximize}, {self.asked} was asked for: take another directory"
                )
            self.maximize = maximize
        self.trials.pop(key, None)
        self.trials[key] = trial

    def _show(self) -> None:
        if self._journal is None or self.best is None:
            return
        record = _record(self.best, self.trials[self.best], self.maximize)
        record["state"] = self._state_file.name if self.state is not None else None
        text = json.dumps({name: value for name, value in record.items() if name != "error"}, indent=2)
        write_whole(self._journal.directory / "best.json", text.encode() + b"\n")
        if self.state is None:
            self._state_file.unlink(missing_ok=True)


@contextmanager
def standing(directory: str | os.PathLike[str] | None, maximize: bool | None) -> Iterator[Standing]:
    """The standing of the search in `directory`, held for the block; without a directory, in memory alone."""
    if directory is None:
        yield Standing(maximize, None)
        return
    with Journal(directory) as journal:
        yield Standing(maximize, journal)


# --- records ---


def _record(key: str, trial: Trial, maximize: bool | None) -> Record:
    record: Record = {"key": key, **trial._asdict(), "maximize": maximize}
    record["score"] = _text(trial.score)
    record["measures"] = {name: _text(value) for name, value in trial.measures.items()}
    record["history"] = [{name: _text(value) for name, value in row.items()} for row in trial.history]
    return record


def _text(number: float) -> float | str:
    # JSON has no nan and no infinity.
    return number if math.isfinite(number) else str(number)


def _trial(record: Record) -> tuple[Trial, bool | None]:
    def numbers(row: dict[str, Any]) -> dict[str, float]:
        return {name: float(value) for name, value in row.items()}

    values = {name: record[name] for name in Trial._fields}
    values |= {
        "score": float(record["score"]),
        "measures": numbers(record["measures"]),
        "history": tuple(numbers(row) for row in record["history"]),
    }
    return Trial(**values), record["maximize"]
