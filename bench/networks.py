"""The same multilayer perceptron and AdamW step in functrain, PyTorch and JAX, from the same numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import functrain as ft

# So small that one batch is not learnt by heart while it is timed: numbers near zero would be another workload.
RATE = 1e-5


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them, the same numbers each time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(sizes: Sequence[int], examples: int) -> dict[str, torch.Tensor]:
    """One batch of random inputs `(N, F)` and labels `(N,)`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, sizes[0], generator=generator)
    return {"x": x, "y": torch.randint(0, sizes[-1], (examples,), generator=generator)}


def loss_of(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Cross entropy for each example."""
    return lambda params, batch: F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")


class Ours:
    """A functrain step that keeps its state: each call takes one step and gives the loss."""

    def __init__(self, step: ft.Step, params: Any, batch: Any) -> None:
        self.step, self.batch, self.state = step, batch, step.init(params)

    def __call__(self) -> torch.Tensor:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]


class Torch:
    """The plain PyTorch loop body: zero_grad, loss, backward, fused AdamW."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.batch["x"]), self.batch["y"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Jax:
    """The same step in JAX with optax, jitted, params and optimizer state donated."""

    def __init__(self, model: nn.Sequential, batch: dict[str, torch.Tensor]) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import jax.numpy as jnp
        import optax

        layers = [child for child in model if isinstance(child, nn.Linear)]
        self.params = [(jnp.array(c.weight.detach().numpy().T), jnp.array(c.bias.detach().numpy())) for c in layers]
        self.x, self.y = jnp.array(batch["x"].numpy()), jnp.array(batch["y"].numpy())
        optimizer = optax.adamw(RATE, weight_decay=1e-2)
        self.state = optimizer.init(self.params)

        def loss(params: Any, x: Any, y: Any) -> Any:
            for weight, bias in params[:-1]:
                x = jax.nn.relu(x @ weight + bias)
            weight, bias = params[-1]
            return optax.softmax_cross_entropy_with_integer_labels(x @ weight + bias, y).mean()

        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, x, y)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.params, self.state, value = self.step(self.params, self.state, self.x, self.y)
        return value.block_until_ready()


def check_same_work(contestants: dict[str, Callable[[], Any]], steps: int = 10) -> None:
    """Raise when the contestants, from the same numbers, do not have the same loss after `steps` steps."""
    ends = {}
    for name, run in contestants.items():
        for _ in range(steps):
            value = run()
        ends[name] = float(value)
    first = next(iter(ends.values()))
    if any(abs(end - first) > 1e-3 * abs(first) for end in ends.values()):
        raise RuntimeError(f"the contestants do not do the same work: losses after {steps} steps are {ends}")
