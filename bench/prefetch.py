"""Bench `prefetch`: what an item costs when nothing is slow, and what overlapping leaves of loading and training."""

from __future__ import annotations

import hashlib
import time
from functools import cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import functrain as ft
from bench.race import Result, compare, race, smoke

ITEMS = 2_000
STEPS = 100
SECONDS = 0.005


class _Ready(ft.Source):
    """A source that has its one item ready."""

    length = ITEMS

    def __init__(self) -> None:
        self.item = torch.zeros(8)

    def get(self, i: int, epoch: int) -> Any:
        return self.item


class _Map(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.zeros(8)


class _Worked(ft.Source):
    """A source whose every load is the work of a step."""

    length = STEPS

    def get(self, i: int, epoch: int) -> Any:
        _work()
        return torch.tensor(i)


def run() -> list[Result]:
    """Race a ready item against torch's DataLoader with two workers, and loading beside training against the slower one alone.

    A turn is an epoch. The second row's peer is its own bound: with a load of as much work as the step, on a second core,
    nothing ends before the slower of the two alone. The first load, which nothing can be beside, is a hundredth of it.
    """
    return [*_ready(), *_beside()]


def _ready() -> list[Result]:
    source = _Ready()
    loader = DataLoader(_Map(), batch_size=None, num_workers=2, persistent_workers=True)

    def ours() -> None:
        with ft.prefetch(source, depth=4) as items:
            for _ in items:
                pass

    def theirs() -> None:
        for _ in loader:
            pass

    times = race({"ours": ours, "DataLoader, 2 workers": theirs}, rounds=7, turn=0.3)
    each = {name: [seconds / ITEMS for seconds in row] for name, row in times.items()}
    return compare("prefetch", "one ready item through prefetch (depth 4)", each, "ours", {"DataLoader, 2 workers": 0.1})


def _beside() -> list[Result]:
    source = _Worked()

    def ours() -> None:
        with ft.prefetch(source, depth=4) as items:
            for _ in items:
                _work()

    def loads() -> None:
        for _ in source:
            pass

    def steps() -> None:
        for _ in range(STEPS):
            _work()

    def one_by_one() -> None:
        for _ in source:
            _work()

    times = race({"ours": ours, "loads": loads, "steps": steps, "one after the other": one_by_one}, rounds=7, turn=0.3)
    each = {name: [seconds / STEPS for seconds in row] for name, row in times.items()}
    each["max(load, step) alone"] = [max(pair) for pair in zip(each["loads"], each["steps"])]
    work = f"a step with its load beside it, each {SECONDS * 1e3:g} ms of hashing on one core"
    return compare("prefetch", work, each, "ours", {"max(load, step) alone": 1.05, "one after the other": None})


def _work() -> None:
    hashlib.sha256(_data()).digest()


@cache
def _data() -> bytes:
    # As many bytes as are hashed in that time: hashing lets other threads run, and takes no memory bandwidth to speak of.
    piece = bytes(1 << 16)
    if smoke():
        return piece
    fastest = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        hashlib.sha256(piece).digest()
        fastest = min(fastest, time.perf_counter() - start)
    return bytes(round(len(piece) * SECONDS / fastest))
