"""What happens in a run, as values: observers receive them and cannot change the state."""

from __future__ import annotations

from typing import Any, NamedTuple


class Started(NamedTuple):
    """Training begins, or goes on, at `position` of `steps`; `skipped` names damaged checkpoints that were passed over."""

    position: int
    steps: int
    steps_per_epoch: int
    skipped: list[str]


class Stepped(NamedTuple):
    """One step was taken; `metrics` are 0-d tensors."""

    position: int
    metrics: dict[str, Any]


class EpochEnded(NamedTuple):
    """An epoch ended; `row` is what was logged."""

    row: dict[str, Any]


class Saved(NamedTuple):
    """A checkpoint of `position` is on the disk."""

    position: int


Event = Started | Stepped | EpochEnded | Saved
