"""Bench `prefetch`: what an item costs when nothing is slow."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import functrain as ft
from bench.race import Result, compare, race

ITEMS = 2_000


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


def run() -> list[Result]:
    """Race prefetching a ready item against torch's DataLoader with two workers, an epoch a turn."""
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
