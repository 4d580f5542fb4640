"""Bench `repeat`: eight steps of a small perceptron in one graph, against steps one by one and a scan of JAX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import functrain as ft
from bench import bounds, jaxed, networks
from bench.networks import RATE, Ours, check_same_work, loss_of
from bench.peers import FUSED, Torch, over
from bench.race import Result, compare, race

STEPS = 8
SCAN = f"JAX jit, donated, optax, {STEPS} steps a scan"
ALONE = "ours, compiled, a step a call"


def run() -> list[Result]:
    """Race eight steps over eight batches; figures are a step's."""
    work = networks.small()
    batches = {name: torch.stack([leaf.roll(shift, 0) for shift in range(STEPS)]) for name, leaf in work.batch.items()}
    # Rows moved around: other batches, of the same loss.
    apart = ft.tree.unstack(batches)
    params, apply = ft.functional(work.module())
    step = ft.step(ft.grad(loss_of(apply)), ft.optim.adamw(RATE))
    contestants: dict[str, Callable[[], Any]] = {
        "repeat": Ours(ft.compiled(ft.repeat(step, STEPS)), params, batches),
        ALONE: over(Ours(ft.compiled(step), params, work.batch), apart),
        FUSED: over(Torch(work.module(), work.batch), apart),
        SCAN: jaxed.repeated(work, batches),
    }
    check_same_work(contestants)
    times = {name: [seconds / STEPS for seconds in row] for name, row in race(contestants).items()}
    limit = bounds.bound(bounds.step_needs(work).times(STEPS)).per(STEPS)
    name = f"{work.name}; {STEPS} steps a graph, compiled, donated, a step"
    return compare("repeat", name, times, "repeat", {FUSED: 0.30, SCAN: 0.50, ALONE: None}, limit)
