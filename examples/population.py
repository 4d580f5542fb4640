"""A population of learning rates on handwritten digits: one vmapped, compiled program trains all of them.

    python examples/population.py --picture rates.png

Every member has its own params, optimizer state and rate; they share the batches, and one graph steps all of them. The loss of
each on validation digits is measured along the way. It ends with a table of rates and accuracies, and with the rate that
`ft.lr_find` suggests after one short run; the picture shows the loss over rate and step, and both curves over the rate.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from digits import digits_file  # beside this file
from torch import Tensor, nn

import functrain as ft
from functrain.engine.lr_find import RangeTest


class Course(NamedTuple):
    """How validation went: `steps` (T,), `loss` and `accuracy` (T, K) for the rates (K,)."""

    rates: Tensor
    steps: list[int]
    loss: Tensor
    accuracy: Tensor


def experiment(train: ft.Source, valid: dict[str, Tensor], rates: Tensor, steps: int, every: int) -> tuple[Course, RangeTest]:
    """Train all rates at once, measuring every so many steps; and test the range of rates from the same start."""
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))

    def loss(params, batch):
        return F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")

    def judged(params):
        scores = apply(params, valid["x"])
        return F.cross_entropy(scores, valid["y"]), (scores.argmax(1) == valid["y"]).float().mean()

    alone = ft.step(ft.grad(loss), ft.optim.adamw(1e-3))
    start = alone.init(params)
    together = ft.population(alone)
    state = together.init([ft.with_hyper(start, lr=rate) for rate in rates])

    places, rows = [0], [torch.func.vmap(judged)(state.params)]
    for state, _ in ft.fold(ft.compiled(together), state, train, steps=steps):
        place = int(state.position[0])
        if place % every == 0 or place == steps:
            places.append(place)
            rows.append(torch.func.vmap(judged)(state.params))
    course = Course(rates, places, *map(torch.stack, zip(*rows)))
    return course, ft.lr_find(alone, start, train, low=1e-6)


def report(course: Course, test: RangeTest) -> str:
    """A table of rates with the suggested one in its place, as if it were another member's."""
    lines = [f"{'rate':>10}{'validation loss':>18}{'accuracy':>10}"]
    best = int(course.accuracy[-1].argmax())
    for member, rate in enumerate(course.rates.tolist()):
        if test.suggestion and rate >= test.suggestion and (member == 0 or course.rates[member - 1] < test.suggestion):
            lines.append(f"{test.suggestion:>10.2e}  suggested by ft.lr_find")
        mark = "  best" if member == best else ""
        lines.append(f"{rate:>10.2e}{course.loss[-1, member]:>18.4f}{course.accuracy[-1, member]:>10.4f}{mark}")
    return "\n".join(lines)


def draw(course: Course, test: RangeTest, path: Path) -> None:
    """The validation loss over rate and step; beside it, over the same rates, the last accuracy and the range test."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2, width_ratios=(1.2, 1))
    # A member that has diverged is as bad as a bad one: the colours are for the others.
    loss = course.loss.nan_to_num(10.0, 10.0).clamp(max=10.0)
    map_ = panels[0].pcolormesh(course.rates, course.steps, loss, norm=LogNorm(), shading="nearest", cmap="viridis")
    figure.colorbar(map_, ax=panels[0], label="validation loss")
    panels[0].set_ylabel("step", fontsize=9)
    panels[1].plot(
        course.rates, course.accuracy[-1], "o-", color="#3b6fb6", markersize=4, label="validation accuracy at the end"
    )
    panels[1].set_ylim(0, 1.02)
    other = panels[1].twinx()
    other.plot(test.rates, test.smoothed, color="#e08214", label="smoothed loss of the range test")
    other.set_ylim(0, 2 * test.smoothed[0])
    panels[1].set_ylabel("accuracy", fontsize=9)
    other.set_ylabel("loss", fontsize=9)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlim(course.rates[0], course.rates[-1])
        panel.set_xlabel("learning rate", fontsize=9)
        if test.suggestion:
            panel.axvline(test.suggestion, color="#b5404a", linestyle="--", linewidth=1.2, label="suggested")
    handles = [*panels[1].get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    panels[1].legend(handles=handles, fontsize=8, frameon=False, loc="lower left")
    figure.suptitle(f"{len(course.rates)} learning rates as one program", fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Train the population, print the table, draw the picture where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data/digits.h5"), help="the digits' file, written once")
    parser.add_argument("--picture", type=Path, help="where the loss over rate and step is drawn")
    parser.add_argument("--members", type=int, default=16, help="how many learning rates")
    parser.add_argument("--low", type=float, default=1e-4, help="the lowest of them")
    parser.add_argument("--high", type=float, default=1.0, help="the highest")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=5, help="steps between two measurements")
    flags = parser.parse_args()

    # Networks this small: a second thread inside an operation would wait more than it works.
    torch.set_num_threads(1)
    digits, held_out = ft.hdf5(digits_file(flags.data), group="train").split(0.8, seed=0)
    rates = torch.logspace(*torch.tensor([flags.low, flags.high]).log10().tolist(), flags.members, dtype=torch.float64)
    began = time.perf_counter()
    train, valid = digits.shuffle(seed=0).batch(64, drop_last=True), held_out.batch(len(held_out))(0)
    course, test = experiment(train, valid, rates, flags.steps, flags.every)
    print(report(course, test))
    print(f"\n{flags.members} members, {flags.steps} steps, and a range test: {time.perf_counter() - began:.1f} s")
    if flags.picture:
        draw(course, test, flags.picture)
        print(f"picture: {flags.picture}")


if __name__ == "__main__":
    main()
