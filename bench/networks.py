"""The networks, batches and loss that the benches share, and the functrain steps around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrain as ft

# So small that one batch is not learnt by heart while it is timed: numbers near zero would be another workload.
RATE = 1e-5
LABELS = 10


class Work(NamedTuple):
    """A network, made anew with the same numbers at each call, and a batch for it."""

    name: str
    module: Callable[[], nn.Sequential]
    batch: dict[str, Tensor]


def small() -> Work:
    """A perceptron so small that dispatch is most of a step."""
    return perceptron_work([64, 128, 128, LABELS], 128)


def big() -> Work:
    """A perceptron that is matrix products and little else."""
    return perceptron_work([784, 1024, 1024, LABELS], 512)


def images() -> Work:
    """A convolutional network on images (N, 1, 28, 28)."""
    batch = data([784, LABELS], 128)
    return Work("CNN 1-16-32, images 28 × 28, batch 128", convolutional, batch | {"x": batch["x"].reshape(-1, 1, 28, 28)})


def sequences() -> Work:
    """A recurrent network on sequences (N, T, F)."""
    batch = data([32 * 64, LABELS], 64)
    return Work("LSTM 64-128, 32 steps, batch 64", recurrent, batch | {"x": batch["x"].reshape(-1, 32, 64)})


def perceptron_work(sizes: Sequence[int], examples: int) -> Work:
    """A perceptron of these sizes, and a batch of so many examples."""
    return Work(f"MLP {'-'.join(map(str, sizes))}, batch {examples}", lambda: perceptron(sizes), data(sizes, examples))


def perceptron(sizes: Sequence[int], seed: int = 0) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them, the same numbers each time."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Two convolutions and a linear layer for images (N, 1, 28, 28)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1568, LABELS))


class Last(nn.Module):
    """Of what a recurrent layer returns, the output `(N, F)` after the last step."""

    def forward(self, outputs: tuple[Tensor, Any]) -> Tensor:
        """`(N, T, F)`, beside the hidden state, to `(N, F)`."""
        return outputs[0][:, -1]


def recurrent() -> nn.Sequential:
    """An LSTM and a linear layer on its last output."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LSTM(64, 128, batch_first=True), Last(), nn.Linear(128, LABELS))


def data(sizes: Sequence[int], examples: int) -> dict[str, Tensor]:
    """One batch of random inputs `(N, F)` and labels `(N,)`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, sizes[0], generator=generator)
    return {"x": x, "y": torch.randint(0, sizes[-1], (examples,), generator=generator)}


def loss_of(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cross entropy for each example."""
    return lambda params, batch: F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")


class Ours:
    """A functrain step that keeps its state: each call takes one step and gives the loss."""

    def __init__(self, step: ft.Step, params: Any, batch: Any) -> None:
        self.step, self.batch, self.state = step, batch, step.init(params)

    def __call__(self) -> Tensor:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]


class Given:
    """A gradient that is its batch: what is left of a step around it is the optimizer's update."""

    uses: frozenset[str] = frozenset()
    lanes, reduce = False, ft.reduce.mean

    def __call__(self, params: Any, batch: Any, **_: Any) -> ft.Gradient:
        return ft.Gradient(batch, torch.zeros(()), torch.ones(()), None, None)

    finished = __call__


def check_same_work(contestants: Mapping[str, Callable[[], Any]], steps: int = 10, digits: float = 1e-4) -> None:
    """Raise when the contestants, from the same numbers, do not have the same losses.

    The first loss (or losses, one for each member or step) has to agree to `digits`, and what `steps` steps take off it to 2 %:
    the steps are so small that the losses alone would agree whatever the optimizer did.
    """
    found = {}
    for name, run in contestants.items():
        losses = [numbers(run()) for _ in range(steps)]
        found[name] = losses[0], losses[0] - losses[-1]
    first, fall = next(iter(found.values()))
    for name, (theirs, fallen) in found.items():
        off = abs(theirs - first) > digits * abs(first)
        if off.any() or (abs(fallen - fall) > 0.02 * abs(fall) + 1e-6 * abs(first)).any():
            raise RuntimeError(f"{name} does not do the same work: first losses and falls in {steps} steps are {found}")


def numbers(value: Any) -> Any:
    """A loss, or the losses of several members or steps, as an array of NumPy's."""
    return numpy.asarray([float(each) for each in value] if isinstance(value, list) else value, dtype=float).reshape(-1)
