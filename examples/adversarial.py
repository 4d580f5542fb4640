"""Two networks against each other: a generator learns the plane's ring of eight Gaussians from a discriminator's judgement.

    python examples/adversarial.py --steps 2000 --picture ring.png

`ft.adversarial` makes one step of two players, each with its own loss, optimizer and schedule, over one state. The generator's
noise comes of the step's key, so a run can be replayed and resumed like any other. How far the generated points are from the
data is measured as the program goes: by the energy distance, which is 0 for equal distributions alone. With `--picture` the
points are drawn.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrain as ft


def ring(key: Tensor, count: int) -> Tensor:
    """Points `(count, 2)` of eight Gaussians (standard deviation 0.05) on a circle of radius 1."""
    angle = torch.floor(8 * ft.random.uniform(ft.random.fold_in(key, 0), (count,))) * (math.pi / 4)
    centre = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    return centre + 0.05 * ft.random.normal(ft.random.fold_in(key, 1), (count, 2))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E‖A − B‖ − E‖A − A′‖ − E‖B − B′‖ of samples `(n, d)` and `(m, d)` (Székely and Rizzo, 2013)."""
    return float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean())


def network(inputs: int, width: int, outputs: int) -> nn.Module:
    """Two hidden layers."""
    hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def game(steps: int, width: int = 64, noise: int = 4):
    """The step of both players, their params, and `samples(params, key, count)`, which generates points."""
    torch.manual_seed(0)
    generator, generate = ft.functional(network(noise, width, 2))
    discriminator, judge = ft.functional(network(2, width, 1))

    def samples(params, key, count):
        return generate(params["generator"], ft.random.normal(key, (count, noise)))

    def told_apart(params, batch, *, key):
        fake = generate(params["generator"], ft.random.normal(key, (noise,)))
        real, false = judge(params["discriminator"], batch), judge(params["discriminator"], fake)
        losses = F.softplus(-real) + F.softplus(false)
        return ft.Losses(losses.squeeze(1), aux={"right": (0.5 * (real > 0) + 0.5 * (false < 0)).squeeze(1)})

    def taken_for_real(params, batch, *, key):
        fake = generate(params["generator"], ft.random.normal(key, (noise,)))
        return F.softplus(-judge(params["discriminator"], fake)).squeeze(1)

    step = ft.adversarial(
        {
            "discriminator": (ft.grad(told_apart), ft.optim.adam(ft.optim.cosine(2e-3, steps), b1=0.5)),
            "generator": (ft.grad(taken_for_real), ft.optim.adam(ft.optim.cosine(1e-3, steps), b1=0.5)),
        }
    )
    return step, {"generator": generator, "discriminator": discriminator}, samples


def near(points: Tensor) -> float:
    """The share of points within three standard deviations of a centre of the ring; of the data, 0.99."""
    angle = torch.arange(8) * (math.pi / 4)
    return float((torch.cdist(points, torch.stack([angle.cos(), angle.sin()], 1)).amin(1) < 0.15).float().mean())


def draw(points: dict[str, Tensor], path: Path) -> None:
    """Samples side by side, a panel for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(points), 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(points), sharex=True, sharey=True)
    for panel, (name, sample) in zip(panels, points.items()):
        panel.scatter(*sample.T.tolist(), s=4, color="#3b6fb6", linewidths=0)
        panel.set_title(name, fontsize=10)
        panel.set_aspect("equal")
        panel.set_xlim(-1.6, 1.6)
        panel.set_ylim(-1.6, 1.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Train, print how far the generator is from the data, draw it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the data and the noise")
    parser.add_argument("--compile", action="store_true", help="as one graph: takes a while, which long runs win back")
    parser.add_argument("--picture", type=Path, help="where samples are drawn; default: nowhere")
    flags = parser.parse_args()

    # Layers of 64: a second thread inside an operation would wait more than it works.
    torch.set_num_threads(1)
    step, params, samples = game(flags.steps)
    step = ft.compiled(step) if flags.compile else step
    data, test, noise = ft.random.split(ft.random.key(flags.seed), 3)
    source = ft.arrays(ring(data, 8192)).shuffle(seed=flags.seed).batch(256)
    expected = ring(test, 1000)
    state = step.init(params, seed=flags.seed)
    pictures = {"data": expected, "at the start": samples(state.params, noise, 1000)}

    def row(*cells: object) -> None:
        print("".join(f"{cell:>16}" for cell in cells), flush=True)

    row("step", "discriminator", "generator", "distance", "near a centre")
    row(0, "", "", f"{energy_distance(pictures['at the start'], expected):.4f}", f"{near(pictures['at the start']):.3f}")
    for state, metrics in ft.fold(step, state, source, steps=flags.steps):
        if int(state.position) % max(1, flags.steps // 10) == 0:
            points = samples(state.params, noise, 1000)
            losses = [f"{float(metrics[f'{name}.loss']):.4f}" for name in ("discriminator", "generator")]
            row(int(state.position), *losses, f"{energy_distance(points, expected):.4f}", f"{near(points):.3f}")
            pictures[f"after {flags.steps} steps"] = points
    if flags.picture:
        draw(pictures, flags.picture)


if __name__ == "__main__":
    main()
