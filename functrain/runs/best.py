"""The best state of a run: a copy in memory and, given a directory, a file that is whole at any time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from functrain.core import tree
from functrain.core.errors import ArgumentError, RunError
from functrain.core.step import check_owned
from functrain.core.tree import Tree
from functrain.engine.fold import position
from functrain.runs.store import load_metadata, load_tree, named_leaves, save_tree
from functrain.search.measures import number

_RECORD = "functrain.best"


class Best:
    """Keeps the state that had the best value of all that it was offered.

    - `score`: what the values are called; `maximize`: whether larger is better (`maximize=False` for losses);
    - `directory`: where each new best state is written, as `best.safetensors`: the state and its value in one file, so that
      a crash at any moment leaves the best one so far. `Best.load(directory, like)` goes on from it.

    `value`, `state` and `position` are those of the best one so far, None before there is one. The state is a copy: that
    of a donating step may be offered. `ft.History(keep=best)` offers the state of each row.

    Raises `RunError` for a directory that has a best state already: it is not given up unseen.

    >>> import torch
    >>> best = Best("loss", maximize=False)
    >>> [best.offer(loss, {"w": torch.tensor(loss)}) for loss in (0.5, float("nan"), 0.7, -0.2, -0.2)]
    [True, False, False, True, False]
    >>> best.value, best.state
    (-0.2, {'w': tensor(-0.2000)})
    """

    def __init__(self, score: str = "accuracy", maximize: bool = True, directory: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(score, str) or not score:
            raise ArgumentError(f"score is the name of a measure, such as 'accuracy', got {score!r}")
        if not isinstance(maximize, bool):
            raise ArgumentError(f"maximize is True (larger is better) or False, got {maximize!r}")
        self.score, self.maximize = score, maximize
        self.value: float | None = None
        self.state: Tree = None
        self.position: int | None = None
        self._file = None if directory is None else _file(directory)
        if self._file is not None and self._file.exists():
            raise RunError(
                f"{self._file} is the best state of an earlier run: go on from it with Best.load(directory, like=state), or "
                "choose another directory"
            )

    @classmethod
    def load(cls, directory: str | os.PathLike[str], like: Tree) -> Best:
        """The best state in a directory, in the structure of `like` and on its devices; what is offered has to be better.

        Raises `RunError` where there is none, or a damaged one, and `TreeError` when it is another tree than `like`.
        """
        file = _file(directory)
        try:
            record = json.loads(load_metadata(file)[_RECORD])
            score, maximize, value, place = (record[name] for name in ("score", "maximize", "value", "position"))
            best = cls(score, maximize)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is damaged, or not the best state that a Best has written: {error}") from error
        best.value, best.state, best.position, best._file = float(value), load_tree(file, like), place, file
        return best

    def offer(self, value: Any, state: Tree) -> bool:
        """Whether `value` is better than all before it, so that `state` was kept.

        A first finite value always is; NaN and infinities never are; of equal ones the first stays. The value is a number or a
        0-d tensor, the state any tree of tensors.

        Raises `ArgumentError` for a value that is no number, `DonatedError` for a state that a step has taken over, `TreeError`
        for leaves that are not tensors, and `RunError` when the state cannot be written: then the one before stays.
        """
        found = number(value, f"the {self.score} offered", "expected a number")
        if not self._better(found):
            return False
        place = None
        if hasattr(state, "position"):
            check_owned(state)
            place = position(state)
        named_leaves(state)
        copy = tree.map(lambda leaf: leaf.detach().clone(), state)
        if self._file is not None:
            self._write(copy, found, place)
        self.value, self.state, self.position = found, copy, place
        return True

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return self.value is None or (value > self.value if self.maximize else value < self.value)

    def _write(self, state: Tree, value: float, place: int | None) -> None:
        assert self._file is not None
        record = {"score": self.score, "maximize": self.maximize, "value": value, "position": place}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"could not make the directory {self._file.parent}: {error}") from error
        save_tree(self._file, state, {_RECORD: json.dumps(record)})

    def __repr__(self) -> str:
        if self.value is None:
            return f"<Best {self.score}: none yet>"
        return f"<Best {self.score}: {self.value:g}{'' if self.position is None else f' at position {self.position}'}>"


def _file(directory: str | os.PathLike[str]) -> Path:
    return Path(directory) / "best.safetensors"
