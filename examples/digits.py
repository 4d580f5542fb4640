"""Handwritten digits, from an HDF5 file to a trained network: `functrain train examples/digits.py`.

The digits are those that scikit-learn ships (UCI's "Optical recognition of handwritten digits", 1797 images of 8 × 8). They
are written once to an HDF5 file and streamed from it: memory-mapped, shuffled, batched and prefetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import functrain as ft


@dataclass(frozen=True)
class Config:
    """What can be varied about the digits run."""

    data: Path = Path("data/digits.h5")
    """The HDF5 file; written when it is not there."""
    epochs: int = 40
    """Passes over the training digits."""
    batch: int = 64
    """Examples in a batch."""
    parts: int = 8
    """Sub-batches whose gradients are reduced up one tree."""
    exact: bool = False
    """The same bits for every number of workers, at the price of a fused backward pass."""
    how: Literal["auto", "fused", "vmap", "threads", "loop"] = "auto"
    """The plan for the parts; a compiled step loops where threads are asked for."""
    workers: int | None = None
    """Threads for the plan `threads`; as many as there are processors when not given."""
    rate: float = 3e-3
    """Peak learning rate of the cosine schedule."""
    dropout: float = 0.2
    """Probability that a hidden unit is dropped."""
    compiled: bool = True
    """Whether the step runs as one compiled graph."""
    depth: int = 4
    """Batches prefetched."""
    seed: int = 0
    """Of the weights, the order of the data and dropout."""


def digits_file(path: str | Path) -> Path:
    """The digits as HDF5: groups `train` (80 %) and `test`, each with `x` (N, 1, 8, 8) float32 in [0, 1] and `y` (N,) int64."""
    path = Path(path)
    if path.exists():
        return path
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    y = labels[order].astype(np.int64)
    border = len(x) * 8 // 10
    path.parent.mkdir(parents=True, exist_ok=True)
    ft.h5write(path, {"train": {"x": x[:border], "y": y[:border]}, "test": {"x": x[border:], "y": y[border:]}}, overwrite=True)
    return path


def network(dropout: float) -> nn.Module:
    """A small convolutional network for images (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def experiment(config: Config) -> ft.Experiment:
    """The digits run as a value: nothing happens before something runs it."""
    torch.manual_seed(config.seed)
    params, apply = ft.functional(network(config.dropout))

    def loss(params, batch, *, key):
        scores = apply(params, batch["x"], key=key)
        return F.cross_entropy(scores, batch["y"], reduction="none", label_smoothing=0.05)

    def judged(params, batch):
        scores = apply.eval()(params, batch["x"])
        right = scores.argmax(1) == batch["y"]
        return ft.Losses(F.cross_entropy(scores, batch["y"], reduction="none"), aux={"accuracy": right})

    file = digits_file(config.data)
    # Without the ragged last batch there is one shape to compile for; each epoch leaves out other digits.
    train = ft.hdf5(file, "train").shuffle(seed=config.seed).batch(config.batch, drop_last=True)
    test = ft.hdf5(file, "test").batch(360)

    plan = {"how": config.how, "workers": config.workers, "exact": config.exact}
    grad = ft.parallel(ft.grad(loss), parts=config.parts, reduce=ft.reduce.mean, **plan)
    schedule = ft.optim.cosine(config.rate, max(1, config.epochs * len(train)))
    step = ft.step(grad, ft.optim.adamw(schedule))
    if config.compiled:
        step = ft.compiled(step)

    def evaluate(state):
        return {f"test/{name}": value for name, value in ft.evaluate(judged, state.params, test).items()}

    return ft.Experiment(
        step, params, train, config.epochs, evaluate, seed=config.seed, depth=config.depth, score="test/accuracy"
    )


if __name__ == "__main__":
    raise SystemExit("this is a program for the command line: functrain train examples/digits.py")
