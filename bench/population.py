"""Bench `population`: one step of 64 small perceptrons at once, against a loop over them and a vmap of JAX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import functrain as ft
from bench import bounds, jaxed
from bench.networks import RATE, Ours, check_same_work, loss_of, perceptron, perceptron_work
from bench.peers import Torch, each
from bench.race import Result, compare, race

MEMBERS, EXAMPLES = 64, 128
LOOP, VMAP = "PyTorch eager, fused AdamW, one by one", "JAX vmap, jit, donated, optax"


def run() -> list[Result]:
    """Race members of two sizes on a batch that they share."""
    return _members([64, 32, 10]) + _members([64, 128, 128, 10])


def _members(sizes: list[int]) -> list[Result]:
    work = perceptron_work(sizes, EXAMPLES)
    modules = [perceptron(sizes, seed) for seed in range(MEMBERS)]
    _, apply = ft.functional(work.module())
    step = ft.step(ft.grad(loss_of(apply)), ft.optim.adamw(RATE))
    states = [step.init(ft.functional(module)[0]) for module in modules]
    contestants: dict[str, Callable[[], Any]] = {
        "compiled, donated": Ours(ft.compiled(ft.population(step)), states, work.batch),
        "uncompiled, pure": Ours(ft.population(step), states, work.batch),
        VMAP: jaxed.population(modules, work.batch),
        # Last: it trains the modules themselves.
        LOOP: each([Torch(module, work.batch) for module in modules]),
    }
    check_same_work(contestants)
    times = race(contestants, turn=0.1)
    limit = bounds.bound(bounds.step_needs(work).times(1, MEMBERS))
    name = f"{MEMBERS} × {work.name}"
    return [
        *compare("population", f"{name}; compiled, donated", times, "compiled, donated", {LOOP: 0.20, VMAP: 0.50}, limit),
        *compare("population", f"{name}; uncompiled, pure", times, "uncompiled, pure", {LOOP: None, VMAP: None}),
    ]
