"""Bench `reduce`: what each reducer costs beside the plain batch, and what a second worker is worth."""

from __future__ import annotations

import torch
from torch import nn

import functrain as ft
from bench.networks import RATE, Ours, check_same_work, data, loss_of, perceptron
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
    sizes, examples = [784, 1024, 1024, 10], 512
    batch = data(sizes, examples)
    params, apply = ft.functional(perceptron(sizes))
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    contestants = {"plain": Ours(ft.step(grad, optimizer, donate=True), params, batch)}
    for name, reducer in REDUCERS.items():
        step = ft.step(ft.parallel(grad, PARTS, reducer), optimizer, donate=True)
        contestants[name] = Ours(step, params, batch)
    check_same_work({name: contestants[name] for name in ("plain", "mean", "with_noise_scale(mean)")})
    times = race(contestants, rounds=11, turn=0.1)
    work = f"MLP 784-1024-1024-10, batch {examples}; {PARTS} parts"
    return [
        result
        for name in REDUCERS
        for result in compare("reduce", f"{work}, {name}", times, name, {"plain": GOALS.get(name)})
    ]


def network() -> nn.Module:
    """Two convolutions and a linear layer for images (N, 1, 28, 28)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1568, 10))


def _workers() -> list[Result]:
    """Two workers against one, with one thread inside each operation: what parts are worth on two cores."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(128, 1, 28, 28, generator=generator)
    batch = {"x": images, "y": torch.randint(0, 10, (128,), generator=generator)}
    params, apply = ft.functional(network())
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    plans = {
        "two workers": ft.parallel(grad, PARTS, how="threads", workers=2, exact=True),
        "loop on one thread": ft.parallel(grad, PARTS, how="loop", exact=True),
    }
    contestants = {name: Ours(ft.step(plan, optimizer, donate=True), params, batch) for name, plan in plans.items()}
    check_same_work(contestants)
    times = race(contestants, turn=0.1)
    work = f"CNN 1-16-32, images 28 × 28, batch 128; {PARTS} parts, mean, exact, threads with 2 workers"
    return compare("reduce", work, times, "two workers", {"loop on one thread": WORKERS_GOAL})
