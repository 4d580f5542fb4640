"""What the library ships, listed for the laws to run over, and small models to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrain as ft
from functrain.core.optim import Optimizer

PLANS = ("fused", "vmap", "threads", "loop")
REDUCERS = {
    "mean": ft.reduce.mean,
    "sum": ft.reduce.sum,
    "and_mask(0.5)": ft.reduce.and_mask(0.5),
    "sign_vote": ft.reduce.sign_vote,
    "pcgrad": ft.reduce.pcgrad,
    "adasum": ft.reduce.adasum,
    "median": ft.reduce.median,
    "trimmed_mean(0.2)": ft.reduce.trimmed_mean(0.2),
    "geometric_median(steps=16, smoothing=1e-06)": ft.reduce.geometric_median(),
    "krum(1)": ft.reduce.krum(1),
    "multi_krum(1)": ft.reduce.multi_krum(1),
    "clip_per_example(1)": ft.reduce.clip_per_example(1.0),
    "private(1, 0.5)": ft.reduce.private(1.0, 0.5),
    "private(2, 1, size=10)": ft.reduce.private(2.0, 1.0, size=10),
    "with_noise_scale(mean)": ft.reduce.with_noise_scale(ft.reduce.mean),
    "with_noise_scale(pcgrad)": ft.reduce.with_noise_scale(ft.reduce.pcgrad),
}
# The fewest parts that a reducer can tell anything from; 1 for the others.
LEAST_PARTS: dict[str, int] = {"krum(1)": 5, "multi_krum(1)": 5}
SCHEDULES: dict[str, Callable[[float], Any]] = {
    "constant": ft.optim.constant,
    "cosine": lambda rate: ft.optim.cosine(rate, 30, end=rate / 10),
    "warmup": lambda rate: ft.optim.warmup(4, rate),
    "warmup cosine": lambda rate: ft.optim.warmup(4, ft.optim.cosine(rate, 30)),
    "piecewise": lambda rate: ft.optim.piecewise(rate, {3: 0.5, 7: 0.1}),
}
RATES: dict[str, Callable[[float], Any]] = {"number": lambda rate: rate, **SCHEDULES}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": ft.optim.sgd,
    "sgd decay": lambda lr: ft.optim.sgd(lr, weight_decay=0.1),
    "sgd momentum": lambda lr: ft.optim.sgd(lr, momentum=0.9),
    "sgd dampening": lambda lr: ft.optim.sgd(lr, momentum=0.9, dampening=0.5),
    "sgd nesterov": lambda lr: ft.optim.sgd(lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": ft.optim.adam,
    "adam decay": lambda lr: ft.optim.adam(lr, b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.1),
    "adamw": ft.optim.adamw,
    "amsgrad": lambda lr: ft.optim.amsgrad(lr, b2=0.9, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": lambda lr: ft.optim.adamax(lr, weight_decay=0.1),
    "nadam": lambda lr: ft.optim.nadam(lr, weight_decay=0.1),
    "radam": lambda lr: ft.optim.radam(lr, b2=0.9, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": lambda lr: ft.optim.rmsprop(lr, alpha=0.9, centered=True, momentum=0.5),
    "adagrad": lambda lr: ft.optim.adagrad(lr, lr_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": ft.optim.adadelta,
    # The default d of 1 is the very RMS of a first step on a vector: a kink.
    "adafactor": lambda lr: ft.optim.adafactor(lr, d=1.1),
    "lamb": ft.optim.lamb,
    "lamb bounded": lambda lr: ft.optim.lamb(lr, min_norm=0.6, max_norm=1.5, weight_decay=0.1, decoupled=False),
    "lion": lambda lr: ft.optim.lion(lr, weight_decay=0.1),
    "schedule_free": ft.optim.schedule_free,
    "schedule_free warmed": lambda lr: ft.optim.schedule_free(lr, b1=0.8, weight_decay=0.1, warmup_steps=5, r=0.5),
    "chain": lambda lr: ft.optim.chain(ft.optim.clip_by_norm(1.0), ft.optim.adamw(lr)),
    "lookahead": lambda lr: ft.optim.lookahead(ft.optim.sgd(lr, momentum=0.9), every=2),
    "plateau": lambda lr: ft.optim.plateau(ft.optim.adam(lr), 0.5, 0, every=2),
}


def random_tree(shapes: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A tree of normal numbers for a tree of shapes (tuples are shapes, lists and dicts are trees)."""
    if isinstance(shapes, dict):
        return {name: random_tree(shape, seed + 7 * n + 1, dtype) for n, (name, shape) in enumerate(shapes.items())}
    if isinstance(shapes, list):
        return tuple(random_tree(shape, seed + 7 * n + 3, dtype) for n, shape in enumerate(shapes))
    return ft.random.normal(ft.random.key(seed), shapes, dtype)


# --- a small network over nested trees, with weights, aux and a 0-d parameter -------------------------------------


def net_params(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return random_tree({"hidden": {"w": (3, 4), "b": (4,)}, "out": [(4, 2), (2,)], "scale": ()}, seed, dtype)


def net_batch(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    batch = random_tree({"x": (size, 3), "targets": [(size, 2), (size,)]}, seed + 1000, dtype)
    return batch | {"weight": ft.random.uniform(ft.random.key(seed), (size,), dtype) + 0.5}


def net(params: Any, x: Tensor) -> Tensor:
    (w, b), hidden = params["out"], params["hidden"]
    return params["scale"] * (torch.tanh(x @ hidden["w"] + hidden["b"]) @ w + b)


def net_loss(params: Any, batch: Any) -> Any:
    error = net(params, batch["x"]) - batch["targets"][0]
    return ft.Losses(error.square().sum(1), batch["weight"], aux={"size": error.abs().sum(1)})


def plain_loss(params: Any, batch: Any) -> Tensor:
    return (net(params, batch["x"]) - batch["targets"][0]).square()


def keyed_loss(params: Any, batch: Any, *, key: Tensor) -> Any:
    kept = ft.random.dropout(batch["x"], 0.5, key)
    return (net(params, kept) - batch["targets"][0]).square().sum(1), batch["weight"]


def carried_loss(params: Any, batch: Any, *, carry: Any) -> Any:
    """A loss that threads a running mean of its inputs (float) and a count of calls (integer)."""
    mean = 0.9 * carry["mean"] + 0.1 * batch["x"].mean(0)
    error = net(params, batch["x"] - mean) - batch["targets"][0]
    return error.square().sum(1), {"mean": mean.detach(), "count": carry["count"] + 1}


def carried_start(dtype: torch.dtype = torch.float32) -> Any:
    return {"mean": torch.zeros(3, dtype=dtype), "count": torch.tensor(0)}


# --- modules ------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM over time with a linear read-out: (N, T, 3) to (N, T, 2), and its state as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.read = nn.Linear(5, 2)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(x, state)
        return self.read(y), state


def recurrent(seed: int = 0) -> tuple[Any, Any, Any]:
    """Params of a `Recurrent`, its loss that threads the state (lanes first), and where sequences start from."""
    torch.manual_seed(seed)
    params, apply = ft.functional(Recurrent())

    def loss(params: Any, batch: Any, *, carry: Any) -> Any:
        state = tuple(leaf.unsqueeze(0) for leaf in carry)
        y, state = apply(params, batch["x"], state)
        return (y - batch["y"]).square().sum(2), tuple(leaf.squeeze(0) for leaf in state)

    def start(batch: Any) -> Any:
        zeros = batch["x"].new_zeros(len(batch["x"]), 5)
        return zeros, zeros.clone()

    return params, loss, start


def convolutional(seed: int = 0) -> tuple[Any, Any]:
    """Params and keyed loss of a small convolutional network with dropout, for images (N, 1, 6, 6), classes (N,)."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout2d(0.25), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )
    params, apply = ft.functional(module)

    def loss(params: Any, batch: Any, *, key: Tensor) -> Tensor:
        return F.cross_entropy(apply(params, batch["x"], key=key), batch["y"], reduction="none")

    return params, loss


def images(size: int, seed: int = 0) -> Any:
    return {"x": random_tree((size, 1, 6, 6), seed), "y": torch.arange(size) % 3}
