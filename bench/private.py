"""Bench `private`: a step of DP-SGD against Opacus, and what clipping each example costs beside the plain gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrain as ft
from bench.networks import LABELS, RATE, Ours, Work, images, loss_of, perceptron_work, small
from bench.race import Result, compare, race

NORM, NOISE = 1.0, 1.0
# How Opacus finds the gradients of single examples: a rule for each kind of layer (its default), vmap of the gradient, or
# norms alone and a second backward pass.
MODES = ("hooks", "functorch", "ghost")


def run() -> list[Result]:
    """Race three networks: noise on both sides, plain SGD, the same clipping."""
    results = []
    for work in _works():
        _check_same_sums(work)
        results += _steps(work) + _clipping(work)
    return results


def _works() -> list[Work]:
    return [small(), perceptron_work([784, 1024, 1024, LABELS], 256), images()]


def _steps(work: Work) -> list[Result]:
    params, apply = ft.functional(work.module())
    size = len(work.batch["y"])
    grad = ft.parallel(ft.grad(loss_of(apply)), 1, ft.reduce.private(NORM, NOISE, size))
    optimizer = ft.optim.sgd(RATE)
    contestants: dict[str, Callable[[], Any]] = {
        "compiled, donated": Ours(ft.compiled(ft.step(grad, optimizer)), params, work.batch),
        "uncompiled, donated": Ours(ft.step(grad, optimizer, donate=True), params, work.batch),
    }
    contestants |= {f"Opacus, {mode}": Opacus(work.module(), work.batch, mode, NOISE) for mode in MODES}
    times = race(contestants, rounds=9, turn=0.1)
    goals = {f"Opacus, {mode}": 0.5 for mode in MODES}
    return [
        result
        for ours in ("compiled, donated", "uncompiled, donated")
        for result in compare("private", f"{work.name}; DP-SGD step, {ours}", times, ours, goals)
    ]


def _clipping(work: Work) -> list[Result]:
    params, apply = ft.functional(work.module())
    plain = ft.grad(loss_of(apply))
    clipped = ft.parallel(plain, 1, ft.reduce.clip_per_example(NORM))
    contestants = {
        "clipped": lambda: clipped.finished(params, work.batch),
        "plain gradient": lambda: plain.finished(params, work.batch),
    }
    times = race(contestants, rounds=9, turn=0.1)
    return compare("private", f"{work.name}; clipped sum", times, "clipped", {"plain gradient": None})


class Opacus:
    """Opacus's loop body: zero_grad, loss, backward, clip, noise, SGD."""

    def __init__(self, module: nn.Module, batch: dict[str, Tensor], mode: str, noise: float) -> None:
        from opacus import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        # Torch's, of every module with backward hooks whose inputs need no gradient.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        self.batch = batch
        self.loss: Callable[..., Any] = F.cross_entropy
        sgd = torch.optim.SGD(module.parameters(), lr=RATE)
        settings: dict[str, Any] = {"noise_multiplier": noise, "max_grad_norm": NORM, "expected_batch_size": len(batch["y"])}
        if mode == "ghost":
            self.model = GradSampleModuleFastGradientClipping(module, max_grad_norm=NORM, use_ghost_clipping=True)
            self.optimizer = DPOptimizerFastGradientClipping(sgd, **settings)
            self.loss = DPLossFastGradientClipping(self.model, self.optimizer, nn.CrossEntropyLoss())
        else:
            self.model = GradSampleModule(module, force_functorch=mode == "functorch")
            self.optimizer = DPOptimizer(sgd, **settings)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.model(self.batch["x"]), self.batch["y"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def clipped_sum(self) -> dict[str, Tensor]:
        """The sum over examples that one step takes, by the parameters' names."""
        self()
        names = [name.removeprefix("_module.") for name, _ in self.model.named_parameters()]
        return dict(zip(names, [parameter.summed_grad.detach() for parameter in self.model.parameters()]))


def _check_same_sums(work: Work) -> None:
    """Raise where Opacus, in any mode, and functrain do not clip to the same sum, to 1e-6 of its length.

    In float64: what is left is that Opacus clips by ‖g‖ + 1e-6.
    """
    batch = {"x": work.batch["x"].double(), "y": work.batch["y"]}
    params, apply = ft.functional(work.module().double())
    clipped = ft.parallel(ft.grad(loss_of(apply)), 1, ft.reduce.private(NORM, 0.0, size=1))
    ours = clipped.finished(params, batch, key=ft.random.key(0)).grads
    for mode in MODES:
        theirs = Opacus(work.module().double(), batch, mode, 0.0).clipped_sum()
        apart = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items())
        whole = sum(float(value.square().sum()) for value in theirs.values())
        if apart**0.5 > 1e-6 * whole**0.5:
            raise RuntimeError(f"{work.name}: Opacus ({mode}) has another clipped sum, {(apart / whole) ** 0.5:.1e} apart")
