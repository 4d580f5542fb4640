"""The contestants in PyTorch: its plain loop body, by every kernel and compiler that it offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.networks import RATE, Work

FUSED, FOREACH = "PyTorch eager, fused AdamW", "PyTorch eager, foreach AdamW"
COMPILED = "torch.compile, fused AdamW"


class Torch:
    """The plain PyTorch loop body: zero_grad, loss, backward, AdamW.

    `kernel` is the optimizer's, "fused" or "foreach"; `compiled` hands model and loss to `torch.compile`; `autocast` is the
    type that the model computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        kernel: str = "fused",
        compiled: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.batch = batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, **{kernel: True})  # type: ignore[arg-type]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x), y)

        def cast(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=autocast):
                return loss(x, y)

        chosen: Callable[[Tensor, Tensor], Tensor] = loss if autocast is None else cast
        self.loss = torch.compile(chosen, dynamic=False) if compiled else chosen

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.batch["x"], self.batch["y"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def peers_of(work: Work) -> dict[str, Callable[[], Any]]:
    """PyTorch's steps on a network, by name."""
    return {
        FUSED: Torch(work.module(), work.batch),
        FOREACH: Torch(work.module(), work.batch, "foreach"),
        COMPILED: Torch(work.module(), work.batch, compiled=True),
    }


def gradient(work: Work) -> Callable[[], Tensor]:
    """The loss and its gradient in PyTorch, without an optimizer."""
    model, batch = work.module(), work.batch
    params = list(model.parameters())

    def run() -> Tensor:
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        torch.autograd.grad(loss, params)
        return loss.detach()

    return run


def each(runs: list[Torch]) -> Callable[[], list[Tensor]]:
    """Several contestants one after the other: members of a population, in a loop."""
    return lambda: [run() for run in runs]


def over(run: Any, batches: list[dict[str, Tensor]]) -> Callable[[], list[Tensor]]:
    """One contestant over several batches, a step each."""

    def loop() -> list[Tensor]:
        losses = []
        for batch in batches:
            run.batch = batch
            losses.append(run())
        return losses

    return loop
