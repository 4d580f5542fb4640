"""What every step around a step is held to: resumed it has the same bits, and in a population it is the run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instances import net_batch, net_params

import functrain as ft
from functrain.testing import check_step, equal, same_bits


def run(step: ft.Step, state: Any, batches: list[Any]) -> list[tuple[Any, Any]]:
    return list(ft.fold(step, state, batches))


def check_resumes(step: ft.Step, start: Any, batches: list[Any], folder: Path) -> None:
    """Stopped after any step, written with `save_tree`, read again and gone on with, a run ends with the same bits."""
    check_step(step, start, batches)
    rows = run(step, start, batches)
    for stop, (state, _) in enumerate(rows[:-1]):
        ft.save_tree(folder / f"{stop}.safetensors", state)
        again = ft.load_tree(folder / f"{stop}.safetensors", like=start)
        same_bits("resumed", run(step, again, batches[stop + 1 :]), rows[stop + 1 :])


def check_members(step: ft.Step, batches: list[Any]) -> None:
    """Members of a population end where they do alone."""
    alone = [step.init(net_params(seed), seed=seed) for seed in range(3)]
    members = ft.population(step)
    together = run(members, members.init(alone), batches)[-1]
    for place, state in enumerate(alone):
        found = ft.tree.unstack(together)[place]
        equal(f"member {place}", found, run(step, state, batches)[-1], 1e-5)


def net_batches(count: int, size: int = 4, **dtype: Any) -> list[Any]:
    return [net_batch(size, place, **dtype) for place in range(count)]
