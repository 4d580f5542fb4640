"""A grid of learning rates × widths × seeds on handwritten digits: one population for each width.

    python examples/digits_grid.py --directory runs/digits-grid

The digits come from the same HDF5 file as those of digits.py. Learning rates and seeds enter a trial through its
state alone, so that `together` trains all of them at once. Interrupt it and call it again with the same --directory:
it runs what is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import digits_file  # beside this file
from torch import Tensor

import functrain as ft


def initial(width: int, seed: int) -> dict[str, Tensor]:
    """The parameters of a network 64 → width → 10, drawn from a seed of their own."""
    first, second = ft.random.split(ft.random.key(seed), 2)
    return {
        "w1": ft.random.normal(first, (64, width)) * (2 / 64) ** 0.5,
        "b1": torch.zeros(width),
        "w2": ft.random.normal(second, (width, 10)) * (1 / width) ** 0.5,
        "b2": torch.zeros(10),
    }


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> ft.Losses:
    """Cross entropy, and accuracy beside it."""
    hidden = torch.relu(batch["x"].flatten(1) @ params["w1"] + params["b1"])
    scores = hidden @ params["w2"] + params["b2"]
    right = (scores.argmax(-1) == batch["y"]).float()
    return ft.Losses(F.cross_entropy(scores, batch["y"], reduction="none"), aux={"accuracy": right})


def main() -> None:
    """Search, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/digits.h5"), help="the digits' file, written once")
    parser.add_argument("--directory", type=Path, help="where the journal and the best state are kept")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2, help="threads: each trains one population at a time")
    flags = parser.parse_args()

    path = digits_file(flags.data)
    train = ft.hdf5(path, group="train").shuffle(seed=0).batch(128)
    test = ft.hdf5(path, group="test").batch(512)

    def experiment(config: dict[str, Any]) -> ft.Experiment:
        schedule = ft.optim.cosine(config["lr"], flags.epochs * len(train))

        def evaluate(state: ft.State) -> dict[str, float]:
            return {f"test/{name}": value for name, value in ft.evaluate(loss, state.params, test).items()}

        return ft.Experiment(
            step=ft.step(ft.grad(loss), ft.optim.adamw(schedule)),
            params=initial(config["width"], config["seed"]),
            train=train,
            epochs=config["epochs"],
            evaluate=evaluate,
            score="test/accuracy",
        )

    result = ft.grid_search(
        experiment,
        ft.grid(width=[32, 64, 128], lr=[1e-3, 3e-3, 1e-2, 3e-2], seed=[0, 1], epochs=flags.epochs),
        together=("lr", "seed"),
        workers=flags.workers,
        directory=flags.directory,
        progress=lambda done, total, trial: print(f"{done}/{total}  {trial.score:.4f}  {trial.config}"),
    )
    print(f"\n{result.explain()}\n\n{result.table()}\n")
    print(f"best: {result.best} with test accuracy {result.score:.4f}")


if __name__ == "__main__":
    main()
