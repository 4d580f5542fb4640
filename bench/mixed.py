"""Bench `mixed`: steps with bfloat16 for what is computed, float32 for params, where the CPU has bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import functrain as ft
from bench import bounds, networks
from bench.networks import RATE, Ours, Work, check_same_work
from bench.peers import FUSED, Torch
from bench.race import NO_BFLOAT16, Result, compare, race, smoke

AUTOCAST = "PyTorch eager, bfloat16 autocast, fused AdamW"
FLOAT32 = f"{FUSED}, float32"
STEPS, LAST, EXAMPLES = 300, 50, 8192


def run() -> list[Result]:
    """Race both perceptrons, and train each in both types to compare the losses that they end at."""
    small, big = networks.small(), networks.big()
    if smoke():
        # Without the instructions a product of big matrices takes seconds.
        return _steps(small, 0.33) + _trained(small, 4)
    if not bounds.has_bfloat16():
        works = [f"{work.name}; bfloat16, {mode}" for work in (small, big) for mode in ("compiled, donated", _ending(STEPS))]
        return [Result("mixed", work, FLOAT32, None, None, None, None, note=NO_BFLOAT16) for work in works]
    return [*_steps(small, None), *_trained(small, STEPS), *_steps(big, 0.33), *_trained(big, STEPS)]


def half(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss with bfloat16 for what it computes, params staying float32."""
    return ft.mixed(loss, ft.Precision(compute=torch.bfloat16))


def _loss(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The cross entropy itself in float32, as autocast has it.
    return lambda params, batch: F.cross_entropy(apply(params, batch["x"]).float(), batch["y"], reduction="none")


def _steps(work: Work, goal: float | None) -> list[Result]:
    params, apply = ft.functional(work.module())
    grad, optimizer = ft.grad(half(_loss(apply))), ft.optim.adamw(RATE)
    contestants: dict[str, Callable[[], Any]] = {
        "compiled, donated": Ours(ft.compiled(ft.step(grad, optimizer)), params, work.batch),
        "uncompiled, donated": Ours(ft.step(grad, optimizer, donate=True), params, work.batch),
        AUTOCAST: Torch(work.module(), work.batch, autocast=torch.bfloat16),
    }
    # Scores have three digits in bfloat16, too few to see what ten small steps change: `_trained` takes more of them.
    check_same_work(contestants, steps=1, digits=1e-2)
    contestants[FLOAT32] = Torch(work.module(), work.batch)
    times = race(contestants)
    against: dict[str, dict[str, float | None]] = {
        "compiled, donated": {FLOAT32: goal, AUTOCAST: None},
        "uncompiled, donated": {AUTOCAST: None},
    }
    return [
        result
        for name, goals in against.items()
        for result in compare("mixed", f"{work.name}; bfloat16, {name}", times, name, goals, _bound(work, name, contestants))
    ]


def _bound(work: Work, name: str, contestants: dict[str, Callable[[], Any]]) -> bounds.Bound | None:
    if not bounds.has_bfloat16():
        return None
    operators = None if name.startswith("compiled") else bounds.operators(contestants[name])
    return bounds.bound(bounds.step_needs(work), operators, torch.bfloat16)


def _trained(work: Work, steps: int) -> list[Result]:
    """The loss at the end of a training in bfloat16 against the one in float32, as a ratio: no times."""
    ends = [_end(work, steps, change) for change in (half, lambda loss: loss)]
    ratio = ends[0] / ends[1]
    return [Result("mixed", f"{work.name}; bfloat16, {_ending(steps)}", "float32", ratio, ratio, ratio, None, 1.01)]


def _ending(steps: int) -> str:
    return f"not a time: mean loss of steps {max(1, steps - LAST + 1)} to {steps}"


def _end(work: Work, steps: int, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> float:
    """The mean loss of the last steps of training on labels that a fixed random network gave."""
    params, apply = ft.functional(work.module())
    step = ft.compiled(ft.step(ft.grad(change(_loss(apply))), ft.optim.adamw(1e-3)))
    state, losses = step.init(params), []
    for batch in _batches(work, steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return sum(losses[-LAST:]) / len(losses[-LAST:])


def _batches(work: Work, steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    size, features = work.batch["x"].shape
    x = torch.randn(EXAMPLES, features, generator=generator)
    y = (x @ torch.randn(features, networks.LABELS, generator=generator)).argmax(1)
    places = [torch.randint(0, EXAMPLES, (size,), generator=generator) for _ in range(steps)]
    return [{"x": x[rows], "y": y[rows]} for rows in places]
