"""Bench `reduce`: what each reducer costs beside the plain batch, and what a second worker is worth."""

from __future__ import annotations

import functrain as ft
from bench.networks import RATE, Ours, big, check_same_work, images, loss_of
from bench.race import Result, compare, race

PARTS = 8
REDUCERS = {
    "mean": ft.reduce.mean,
    "sum": ft.reduce.sum,
    "median": ft.reduce.median,
    "trimmed_mean(0.2)": ft.reduce.trimmed_mean(0.2),
    "geometric_median": ft.reduce.geometric_median(),
    "krum(2)": ft.reduce.krum(2),
    "multi_krum(2)": ft.reduce.multi_krum(2),
    "and_mask(0.5)": ft.reduce.and_mask(0.5),
    "sign_vote": ft.reduce.sign_vote,
    "pcgrad": ft.reduce.pcgrad,
    "adasum": ft.reduce.adasum,
    "with_noise_scale(mean)": ft.reduce.with_noise_scale(ft.reduce.mean),
    "clip_per_example(1)": ft.reduce.clip_per_example(1.0),
    "private(1, 1)": ft.reduce.private(1.0, 1.0),
}
GOALS = {"mean": 1.03}
WORKERS_GOAL = 1 / 1.6


def run() -> list[Result]:
    """Race the reducers on the big perceptron, and two workers against one on a convolutional network."""
    return _reducers() + _workers()


def _reducers() -> list[Result]:
    work = big()
    params, apply = ft.functional(work.module())
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    contestants = {"plain": Ours(ft.step(grad, optimizer, donate=True), params, work.batch)}
    for name, reducer in REDUCERS.items():
        step = ft.step(ft.parallel(grad, PARTS, reducer), optimizer, donate=True)
        contestants[name] = Ours(step, params, work.batch)
    check_same_work({name: contestants[name] for name in ("plain", "mean", "with_noise_scale(mean)")})
    times = race(contestants, rounds=11, turn=0.1)
    parts = f"{work.name}; {PARTS} parts"
    return [
        result for name in REDUCERS for result in compare("reduce", f"{parts}, {name}", times, name, {"plain": GOALS.get(name)})
    ]


def _workers() -> list[Result]:
    """Two workers against one, with one thread inside each operation: what parts are worth on two cores."""
    work = images()
    params, apply = ft.functional(work.module())
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    plans = {
        "two workers": ft.parallel(grad, PARTS, how="threads", workers=2, exact=True),
        "loop on one thread": ft.parallel(grad, PARTS, how="loop", exact=True),
    }
    contestants = {name: Ours(ft.step(plan, optimizer, donate=True), params, work.batch) for name, plan in plans.items()}
    check_same_work(contestants)
    times = race(contestants, turn=0.1)
    name = f"{work.name}; {PARTS} parts, mean, exact, threads with 2 workers"
    return compare("reduce", name, times, "two workers", {"loop on one thread": WORKERS_GOAL})
