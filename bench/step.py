"""Bench `step`: one AdamW step of perceptrons, a convolutional and a recurrent network, against PyTorch and JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import functrain as ft
from bench import bounds, jaxed, networks, peers
from bench.jaxed import JAX
from bench.networks import RATE, Ours, Work, check_same_work, loss_of
from bench.peers import COMPILED, FOREACH, FUSED
from bench.race import Result, compare, race

Goals = dict[str, float | None]


def run() -> list[Result]:
    """Race all four networks, compiled and not, and the recurrent network's gradient alone."""
    return [
        *_steps(networks.small(), {FUSED: 0.45, JAX: 0.75}, uncompiled=1.10),
        *_steps(networks.big(), {FUSED: 1.00, JAX: 0.95}, uncompiled=1.02),
        *_steps(networks.images(), {FUSED: 0.95, JAX: None}, uncompiled=1.02),
        *_steps(networks.sequences(), {FUSED: None, JAX: None}, uncompiled=1.02),
        *_gradient(networks.sequences()),
    ]


def _steps(work: Work, goals: Goals, uncompiled: float) -> list[Result]:
    params, apply = ft.functional(work.module())
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    ours = {
        "compiled, donated": Ours(ft.compiled(ft.step(grad, optimizer)), params, work.batch),
        "uncompiled, donated": Ours(ft.step(grad, optimizer, donate=True), params, work.batch),
        "uncompiled, pure": Ours(ft.step(grad, optimizer), params, work.batch),
    }
    contestants: dict[str, Callable[[], Any]] = ours | peers.peers_of(work) | {JAX: jaxed.one_step(work)}
    check_same_work(contestants)
    times = race(contestants)
    against: dict[str, Goals] = {
        "compiled, donated": {**goals, FOREACH: None, COMPILED: None},
        "uncompiled, donated": {FUSED: uncompiled, FOREACH: None},
        "uncompiled, pure": {FUSED: None},
    }
    needs = bounds.step_needs(work)
    return [
        result
        for name, goals in against.items()
        for result in compare("step", f"{work.name}; {name}", times, name, goals, _bound(needs, name, ours[name]))
    ]


def _bound(needs: bounds.Needs, name: str, run: Callable[[], Any]) -> bounds.Bound:
    return bounds.bound(needs, None if name.startswith("compiled") else bounds.operators(run))


def _gradient(work: Work) -> list[Result]:
    params, apply = ft.functional(work.module())
    grad = ft.grad(loss_of(apply))
    eager, scan = "PyTorch eager, nn.LSTM", "JAX jit, scan"
    contestants = {
        "gradient": lambda: grad.finished(params, work.batch).loss,
        eager: peers.gradient(work),
        scan: jaxed.gradient(work),
    }
    check_same_work(contestants, steps=1)
    times = race(contestants)
    limit = bounds.bound(bounds.gradient_needs(work), bounds.operators(contestants["gradient"]))
    return compare("step", f"{work.name}; gradient, uncompiled", times, "gradient", {eager: 1.00, scan: 0.60}, limit)
