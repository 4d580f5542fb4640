"""Bench `robust`: attack × reducer → what a network has learnt of the digits when some of its workers lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import functrain as ft
from bench.networks import perceptron
from bench.race import Result, smoke
from examples.digits import digits_file
from functrain.engine.workers import intra_op_threads

PARTS, CORRUPT, BATCH, STEPS = 16, 3, 128, 150
RATE = 0.4
FILE = Path(__file__).with_name("robust.json")

# A reducer, and the factor on the learning rate that suits the size of what it gives.
REDUCERS: dict[str, tuple[ft.Reducer, float]] = {
    "mean": (ft.reduce.mean, 1.0),
    "median": (ft.reduce.median, 1.0),
    "trimmed_mean(0.2)": (ft.reduce.trimmed_mean(0.2), 1.0),
    "geometric_median": (ft.reduce.geometric_median(), 1.0),
    # One part's gradient: 8 examples.
    f"krum({CORRUPT})": (ft.reduce.krum(CORRUPT), 0.25),
    f"multi_krum({CORRUPT})": (ft.reduce.multi_krum(CORRUPT), 1.0),
    # Signs: a step of the learning rate in every coordinate.
    "sign_vote": (ft.reduce.sign_vote, 0.01),
    "and_mask(0.3)": (ft.reduce.and_mask(0.3), 1.0),
    # Up to a sum over parts.
    "adasum": (ft.reduce.adasum, 0.125),
}

Attack = Callable[[Tensor, Tensor], Tensor]


def _noise(leaf: Tensor, key: Tensor) -> Tensor:
    return leaf + 100 * ft.random.normal(key, tuple(leaf.shape), leaf.dtype)


# What a corrupt part sends in place of a leaf of its gradient.
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "labels flipped": None,
    "sign flipped, × 10": lambda leaf, key: -10 * leaf,
    "Gaussian noise, σ = 100": _noise,
    "NaN": lambda leaf, key: torch.full_like(leaf, torch.nan),
}


class Attacked:
    """A gradient that sends something else for batches whose rows are flagged as `corrupt`: `ft.grad` around a lie."""

    def __init__(self, grad: Any, attack: Attack) -> None:
        self.grad, self.attack = grad, attack
        self.uses = grad.uses | {"key"}
        self.lanes, self.reduce = grad.lanes, grad.reduce

    def __call__(self, params: Any, batch: Any, *, carry: Any = None, key: Tensor | None = None) -> ft.Gradient:
        assert key is not None
        honest = self.grad(params, batch, carry=carry, key=key if "key" in self.grad.uses else None)
        corrupt = batch["corrupt"].all()
        leaves, spec = ft.tree.flatten(honest.grads)
        own = key if key.ndim == 0 else key[0]
        lies = [self.attack(leaf, ft.random.fold_in(own, place)) for place, leaf in enumerate(leaves)]
        sent = [torch.where(corrupt, lie, leaf) for lie, leaf in zip(lies, leaves)]
        return honest._replace(grads=ft.tree.unflatten(spec, sent))

    def finished(self, params: Any, batch: Any, *, carry: Any = None, key: Tensor | None = None) -> ft.Gradient:
        """The same, finished."""
        return self.reduce.finished(self(params, batch, carry=carry, key=key), key)

    def explain(self) -> ft.Stage:
        """What is attacked."""
        return ft.Stage("attacked", {}, [ft.explain(self.grad)])


def flagged(flip: bool) -> Callable[[Any], Any]:
    """A function from a batch to one whose first `CORRUPT` of `PARTS` parts are flagged, their labels flipped if asked for."""

    def flag(batch: Any) -> Any:
        count = sum(ft.tree.part_sizes(len(batch["y"]), PARTS)[:CORRUPT])
        corrupt = torch.arange(len(batch["y"])) < count
        labels = torch.where(corrupt & flip, 9 - batch["y"], batch["y"])
        return {"x": batch["x"], "y": labels, "corrupt": corrupt}

    return flag


def accuracy(reducer: ft.Reducer, rate: float, attack: str, steps: int = STEPS) -> float:
    """The share of the test digits that a small perceptron gets right after training under an attack."""
    params, apply = ft.functional(perceptron([64, 64, 10]))

    def loss(params: Any, batch: Any) -> Any:
        scores = apply(params, batch["x"].flatten(1))
        right = scores.argmax(1) == batch["y"]
        return ft.Losses(F.cross_entropy(scores, batch["y"], reduction="none"), aux={"accuracy": right})

    path = digits_file("data/digits.h5")
    train = ft.hdf5(path, group="train").shuffle(seed=0).batch(BATCH, drop_last=True)
    test = ft.hdf5(path, group="test").batch(360)
    grad, lie = ft.grad(loss), ATTACKS[attack]
    grads = ft.parallel(grad if lie is None else Attacked(grad, lie), PARTS, reducer, how="vmap")
    step = ft.step(grads, ft.optim.sgd(ft.optim.cosine(rate, steps), momentum=0.9))
    batches = train.map(flagged(flip=attack == "labels flipped"))
    state = step.init(params, seed=0)
    for state, _ in ft.fold(step, state, batches, steps=steps):  # noqa: B007
        pass
    return ft.evaluate(loss, state.params, test)["accuracy"]


def run() -> list[Result]:
    """Train once for each attack and reducer, and write robust.json; nothing is timed."""
    found: dict[str, dict[str, float]] = {}
    for name, (reducer, factor) in REDUCERS.items():
        # Parts of 8 examples: a second thread inside an operation would wait more than it works.
        with intra_op_threads(1):
            found[name] = {attack: accuracy(reducer, RATE * factor, attack, 2 if smoke() else STEPS) for attack in ATTACKS}
        print(f"  {name}: " + ", ".join(f"{attack} {share:.3f}" for attack, share in found[name].items()), flush=True)
    if smoke():
        return []
    setting = (
        f"A perceptron 64-64-10 on scikit-learn's digits: {STEPS} steps of SGD with momentum, batches of {BATCH} in {PARTS} "
        f"parts, {CORRUPT} of them corrupt all the time. The share of the 360 test digits that it gets right; guessing: 0.1."
    )
    FILE.write_text(json.dumps({"setting": setting, "accuracy": found}, indent=1, ensure_ascii=False) + "\n")
    return []
