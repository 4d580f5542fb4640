"""One training program, its reducer swapped: what broken workers do to a mean, and what other reducers make of it.

    python examples/reducers.py --corrupt 3 --picture reducers.png

Each batch of digits is cut into 16 parts, as if 16 workers had prepared them. Some are broken: their pixels go from 0 to 16
in place of 0 to 1, and every label is one too high. The program trains the same network with each reducer, by the plan
that `ft.tune` finds fastest for it; nothing else changes. It prints the test accuracies and draws the curves side by side.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import digits_file  # beside this file
from torch import Tensor, nn

import functrain as ft

PARTS = 16
REDUCERS = {
    "mean": ft.reduce.mean,
    "median": ft.reduce.median,
    "trimmed mean": ft.reduce.trimmed_mean(0.2),
    "geometric median": ft.reduce.geometric_median(),
    "multi-Krum": ft.reduce.multi_krum(3),
    "AND-mask": ft.reduce.and_mask(0.3),
    "sign vote": ft.reduce.sign_vote,
    "private": ft.reduce.private(1.0, 1.0),
}
# Told apart by colour-blind readers too.
COLOURS = ("#4d4d4d", "#3b6fb6", "#e08214", "#2c8c5a", "#8e5aa8", "#b5404a", "#56b4e9", "#b59b00")

Curve = list[dict[str, float]]


def broken(parts: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A batch as it is when the workers of its first `parts` parts are broken."""

    def spoilt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x, y = batch["x"].clone(), batch["y"].clone()
        first = sum(ft.tree.part_sizes(len(y), PARTS)[:parts])
        x[:first] *= 16
        y[:first] = (y[:first] + 1) % 10
        return {"x": x, "y": y}

    return spoilt


def trained(reducer: ft.Reducer, train: ft.Source, test: ft.Source, epochs: int) -> tuple[Curve, str]:
    """The program: test loss and accuracy before training and after each epoch, and the plan that was fastest for it."""
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))

    def loss(params, batch):
        scores = apply(params, batch["x"])
        right = scores.argmax(1) == batch["y"]
        return ft.Losses(F.cross_entropy(scores, batch["y"], reduction="none"), aux={"accuracy": right})

    steps = max(1, epochs * len(train))
    step = ft.step(ft.parallel(ft.grad(loss), PARTS, reducer), ft.optim.adamw(ft.optim.cosine(1e-2, steps)))
    state = step.init(params, seed=0)
    step = ft.tune(step, state, train, parts=PARTS, steps=3, show=None).step
    curve = [ft.evaluate(loss, state.params, test)]
    for state, _ in ft.fold(step, state, train, steps=epochs * len(train)):
        if int(state.position) % len(train) == 0:
            curve.append(ft.evaluate(loss, state.params, test))
    return curve, step.grad.plan.how


def draw(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Test loss and test accuracy side by side, a line for each reducer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2)
    for panel, measure in zip(panels, ("loss", "accuracy")):
        for (name, curve), colour in zip(curves.items(), COLOURS):
            panel.plot([row[measure] for row in curve], color=colour, label=name, linewidth=1.7)
        panel.set_title(f"test {measure}", fontsize=10)
        panel.set_xlabel("epoch", fontsize=9)
        panel.grid(color="#e3e3e3", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Train with each reducer, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/digits.h5"), help="the digits' file, written once")
    parser.add_argument("--picture", type=Path, default=Path("runs/reducers.png"), help="where the curves are drawn")
    parser.add_argument("--corrupt", type=int, default=3, help=f"how many of the {PARTS} workers are broken; 0: none")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--reducers", nargs="+", choices=REDUCERS, default=list(REDUCERS), metavar="NAME")
    flags = parser.parse_args()

    path = digits_file(flags.data)
    train = ft.hdf5(path, group="train").shuffle(seed=0).batch(128, drop_last=True).map(broken(flags.corrupt))
    test = ft.hdf5(path, group="test").batch(360)

    # Parts of 8 digits: a second thread inside an operation would wait more than it works.
    torch.set_num_threads(1)
    curves = {}
    print(f"{'reducer':<18}{'test accuracy':>14}{'seconds':>10}  plan")
    for name in flags.reducers:
        start = time.perf_counter()
        curves[name], plan = trained(REDUCERS[name], train, test, flags.epochs)
        seconds = time.perf_counter() - start
        print(f"{name:<18}{curves[name][-1]['accuracy']:>14.4f}{seconds:>10.1f}  {plan}", flush=True)
    draw(curves, f"Handwritten digits, {flags.corrupt} of {PARTS} workers broken", flags.picture)
    print(f"\ncurves: {flags.picture}")


if __name__ == "__main__":
    main()
