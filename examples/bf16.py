"""Digits in half the bits: the same network trained in float32 and with bfloat16 arithmetic, averages beside the params.

    python examples/bf16.py

Both runs start from the same weights and see the same batches with the same dropout. `ft.mixed` casts params and images
to the dtype that is computed in; params, optimizer and batch norm's statistics stay in float32. Each step keeps a moving
average of the params and of the statistics (`ft.averaged`). With `--compute float16` the loss is scaled (`ft.loss_scaled`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import digits_file  # beside this file
from torch import nn

import functrain as ft


def network() -> nn.Module:
    """A small convolutional network with batch norm and dropout, for images (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def main() -> None:
    """Train in each dtype, and compare where the runs end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/digits.h5"), help="the digits' file, written once")
    parser.add_argument("--compute", nargs="+", default=["float32", "bfloat16"], help="the dtypes that are computed in")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--decay", type=float, default=0.98, help="of the moving average")
    flags = parser.parse_args()

    # In operations this small a second thread waits more than it works.
    torch.set_num_threads(1)
    path = digits_file(flags.data)
    train = ft.hdf5(path, group="train").shuffle(seed=0).batch(64)
    test = ft.hdf5(path, group="test").batch(360)
    torch.manual_seed(0)
    params, apply = ft.functional(network())

    def loss(params, batch, *, carry, key):
        scores, carry = apply(params, batch["x"], carry=carry, key=key)
        # The last few operations in float32: they cost nothing, and 8 bits are few for a logarithm.
        return F.cross_entropy(scores.float(), batch["y"], reduction="none"), carry

    def judged(params, batch, *, carry):
        scores, carry = apply.eval()(params, batch["x"], carry=carry)
        right = scores.argmax(1) == batch["y"]
        return ft.Losses(F.cross_entropy(scores.float(), batch["y"], reduction="none"), aux={"accuracy": right}, carry=carry)

    steps = flags.epochs * len(train)
    print(f"{'computed in':<12}  {'test loss':>9}  {'accuracy':>8}  {'of the average':>14}")
    for compute in flags.compute:
        policy = ft.Precision.of(f"compute={compute}")
        grad = ft.grad(ft.mixed(loss, policy))
        step = ft.averaged(ft.step(grad, ft.optim.adamw(ft.optim.cosine(1e-2, max(1, steps)))), flags.decay, carry=True)
        if policy.compute == torch.float16:
            step = ft.loss_scaled(step)
        state = step.init(policy.cast_params(params), carry=apply.buffers, seed=0)
        for state, _ in ft.fold(step, state, train, steps=steps):  # noqa: B007
            pass
        half = ft.mixed(judged, policy)
        last = ft.evaluate(half, state.params, test, carry=state.carry)
        mean = ft.evaluate(half, ft.average(state), test, carry=ft.average(state, "carry"))
        print(f"{compute:<12}  {last['loss']:9.4f}  {last['accuracy']:8.4f}  {mean['accuracy']:14.4f}", flush=True)


if __name__ == "__main__":
    main()
