"""Bench `parallel`: eight parts against the plain batch, and what the plans cost."""

from __future__ import annotations

import functrain as ft
from bench.networks import RATE, Ours, big, check_same_work, loss_of
from bench.race import Result, compare, race

PLANS = ("vmap", "threads", "loop")


def run() -> list[Result]:
    """Race the plans on the big perceptron."""
    work = big()
    params, apply = ft.functional(work.module())
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    contestants = {
        "plain": Ours(ft.step(grad, optimizer, donate=True), params, work.batch),
        "auto": Ours(ft.step(ft.parallel(grad, 8), optimizer, donate=True), params, work.batch),
        "exact": Ours(ft.step(ft.parallel(grad, 8, exact=True), optimizer, donate=True), params, work.batch),
    } | {plan: Ours(ft.step(ft.parallel(grad, 8, how=plan), optimizer, donate=True), params, work.batch) for plan in PLANS}
    check_same_work(contestants)
    times = race(contestants, turn=0.1)
    goals = {"auto": 1.03}
    return [
        result
        for name in ("auto", "exact", *PLANS)
        for result in compare("parallel", f"{work.name}; 8 parts, mean, {name}", times, name, {"plain": goals.get(name)})
    ]
