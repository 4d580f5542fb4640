"""Handwritten digits that nobody can be asked about: DP-SGD with its ε, by `functrain train examples/private.py`.

Each step clips the gradient of every digit and hides their sum in Gaussian noise (`ft.reduce.private`), over batches that
each digit is in by chance (`source.poisson`), as the accounting assumes. The noise is chosen so that the whole run spends
the budget ε; every row of the metrics has the ε spent so far beside the test accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import digits_file  # beside this file
from torch import nn

import functrain as ft


@dataclass(frozen=True)
class Config:
    """What can be varied about the private run."""

    data: Path = Path("data/digits.h5")
    """The HDF5 file; written when it is not there."""
    epsilon: float = 3.0
    """The privacy budget ε of the whole run."""
    delta: float = 1e-5
    """The δ that goes with it, well below 1 / 1437 digits."""
    epochs: int = 30
    """Passes over the training digits, on average: 1 / sampling rate batches each."""
    batch: int = 128
    """Digits in a batch, on average: each of them is in it with probability batch / 1437."""
    norm: float = 1.0
    """The length that no digit's gradient may exceed."""
    rate: float = 0.5
    """Learning rate of SGD with momentum."""
    momentum: float = 0.5
    """Its momentum."""
    seed: int = 0
    """Of the weights, the batches and the noise: who knows it can take the noise off again."""


def network() -> nn.Module:
    """A small convolutional network for images (N, 1, 8, 8); tanh keeps gradients short, so that clipping costs less."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def experiment(config: Config) -> ft.Experiment:
    """The private run as a value."""
    torch.manual_seed(config.seed)
    params, apply = ft.functional(network())

    def loss(params, batch):
        rows, drawn = batch
        # The rows that only fill up a batch have the weight 0.
        return F.cross_entropy(apply(params, rows["x"]), rows["y"], reduction="none"), drawn

    def judged(params, batch):
        scores = apply(params, batch["x"])
        right = scores.argmax(1) == batch["y"]
        return ft.Losses(F.cross_entropy(scores, batch["y"], reduction="none"), aux={"accuracy": right})

    file = digits_file(config.data)
    digits = ft.hdf5(file, "train")
    chance = min(1.0, config.batch / len(digits))
    train = digits.poisson(chance, seed=config.seed, pad=32)
    test = ft.hdf5(file, "test").batch(360)

    steps = max(1, config.epochs * len(train))
    noise = ft.privacy.noise_for(epsilon=config.epsilon, rate=chance, steps=steps, delta=config.delta)
    grad = ft.parallel(ft.grad(loss), parts=1, reduce=ft.reduce.private(config.norm, noise, size=config.batch))
    step = ft.step(grad, ft.optim.sgd(config.rate, momentum=config.momentum), donate=True)

    @cache
    def spent(steps):
        return ft.privacy.epsilon(noise=noise, rate=chance, steps=steps, delta=config.delta) if steps else 0.0

    def evaluate(state):
        measured = {f"test/{name}": value for name, value in ft.evaluate(judged, state.params, test).items()}
        return {**measured, "epsilon": spent(int(state.position))}

    facts = {"privacy": f"ε = {config.epsilon:g} at δ = {config.delta:g}, with a noise multiplier of {noise:.3f}"}
    return ft.Experiment(
        step, params, train, config.epochs, evaluate, seed=config.seed, depth=2, score="test/accuracy", facts=facts
    )


if __name__ == "__main__":
    raise SystemExit("this is a program for the command line: functrain train examples/private.py")
