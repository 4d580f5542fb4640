"""Bench `parallel`: eight parts against the plain batch, and what the plans cost."""

from __future__ import annotations

import functrain as ft
from bench.networks import RATE, Ours, check_same_work, data, loss_of, perceptron
from bench.race import Result, compare, race

PLANS = ("vmap", "threads", "loop")


def run() -> list[Result]:
    """Race the plans on the big perceptron."""
    sizes, examples = [784, 1024, 1024, 10], 512
    batch = data(sizes, examples)
    params, apply = ft.functional(perceptron(sizes))
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    contestants = {
        "plain": Ours(ft.step(grad, optimizer, donate=True), params, batch),
        "auto": Ours(ft.step(ft.parallel(grad, 8), optimizer, donate=True), params, batch),
        "exact": Ours(ft.step(ft.parallel(grad, 8, exact=True), optimizer, donate=True), params, batch),
    } | {plan: Ours(ft.step(ft.parallel(grad, 8, how=plan), optimizer, donate=True), params, batch) for plan in PLANS}
    check_same_work(contestants)
    times = race(contestants, turn=0.1)
    goals = {"auto": 1.03}
    work = "MLP 784-1024-1024-10, batch 512"
    return [
        result
        for name in ("auto", "exact", *PLANS)
        for result in compare("parallel", f"{work}; 8 parts, mean, {name}", times, name, {"plain": goals.get(name)})
    ]
