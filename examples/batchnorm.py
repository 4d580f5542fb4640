"""Batch norm and dropout in parallel: the same bits, whoever does the work.

    python examples/batchnorm.py

A batch of digits is cut into 8 parts. Each part is normalised by its own statistics, and the running ones, which the loss
threads as its carry, are averaged over the parts; each digit has a dropout mask of its own, cut with the batch. Trained
by one thread, by 1, 2, 3 and 8 workers, the network ends with the same parameters and statistics, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import digits_file  # beside this file
from torch import nn

import functrain as ft
from functrain.runs import hash_tree

WORKERS = (1, 2, 3, 8)


def network() -> nn.Module:
    """A small convolutional network with batch norm and dropout, for images (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def plans(parts: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of ways to do the same work, and what `ft.parallel` is told about them."""
    yield "loop", {"parts": parts, "how": "loop"}
    for workers in WORKERS:
        yield f"threads, {workers} worker{'s' * (workers > 1)}", {"parts": parts, "how": "threads", "workers": workers}


def main() -> None:
    """Train the network by each plan, and compare where they end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/digits.h5"), help="the digits' file, written once")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--parts", type=int, default=8, help="sub-batches, each normalised by itself")
    flags = parser.parse_args()

    path = digits_file(flags.data)
    train = ft.hdf5(path, group="train").shuffle(seed=0).batch(128)
    test = ft.hdf5(path, group="test").batch(360)
    torch.manual_seed(0)
    params, apply = ft.functional(network())

    def loss(params, batch, *, carry, key):
        scores, carry = apply(params, batch["x"], carry=carry, key=key)
        return F.cross_entropy(scores, batch["y"], reduction="none"), carry

    def judged(params, batch, *, carry):
        scores, carry = apply.eval()(params, batch["x"], carry=carry)
        right = scores.argmax(1) == batch["y"]
        return ft.Losses(F.cross_entropy(scores, batch["y"], reduction="none"), aux={"accuracy": right}, carry=carry)

    print("Left to itself, parallel chooses")
    print(ft.explain(ft.parallel(ft.grad(loss), flags.parts)), "\n")
    print("and with exact=True")
    print(ft.explain(ft.parallel(ft.grad(loss), flags.parts, exact=True)), "\n")

    print(f"{'plan':<20}  {'params and buffers (sha256)':<28}  test loss  test accuracy")
    found = set()
    for name, settings in plans(flags.parts):
        grad = ft.parallel(ft.grad(loss), exact=True, **settings)
        step = ft.step(grad, ft.optim.adamw(ft.optim.cosine(1e-2, max(1, flags.epochs * len(train)))))
        state = step.init(params, carry=apply.buffers, seed=0)
        for state, _ in ft.fold(step, state, train, steps=flags.epochs * len(train)):  # noqa: B007
            pass
        bits = hash_tree((state.params, state.carry))
        result = ft.evaluate(judged, state.params, test, carry=state.carry)
        print(f"{name:<20}  {bits[:28]}  {result['loss']:9.4f}  {result['accuracy']:13.4f}", flush=True)
        found.add(bits)
    if len(found) > 1:
        raise SystemExit(f"\n{len(found)} different results: bits that depend on who does the work")
    print("\nthe same bits, whoever did the work")


if __name__ == "__main__":
    main()
