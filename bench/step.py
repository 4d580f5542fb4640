"""Bench `step`: one AdamW step of a small and a big perceptron, against PyTorch and JAX."""

from __future__ import annotations

import functrain as ft
from bench.networks import RATE, Jax, Ours, Torch, check_same_work, data, loss_of, perceptron
from bench.race import Result, compare, race

SMALL, BIG = ([64, 128, 128, 10], 128), ([784, 1024, 1024, 10], 512)


def run() -> list[Result]:
    """Race both networks, compiled and not."""
    return _network("MLP 64-128-128-10, batch 128", *SMALL, small=True) + _network(
        "MLP 784-1024-1024-10, batch 512", *BIG, small=False
    )


def _network(work: str, sizes: list[int], examples: int, small: bool) -> list[Result]:
    batch = data(sizes, examples)
    params, apply = ft.functional(perceptron(sizes))
    grad, optimizer = ft.grad(loss_of(apply)), ft.optim.adamw(RATE)
    contestants = {
        "PyTorch eager, fused AdamW": Torch(perceptron(sizes), batch),
        "JAX jit, donated, optax": Jax(perceptron(sizes), batch),
        "compiled, donated": Ours(ft.compiled(ft.step(grad, optimizer)), params, batch),
        "uncompiled, donated": Ours(ft.step(grad, optimizer, donate=True), params, batch),
        "uncompiled, pure": Ours(ft.step(grad, optimizer), params, batch),
    }
    check_same_work(contestants)
    times = race(contestants)
    eager, jit = "PyTorch eager, fused AdamW", "JAX jit, donated, optax"
    # Goals of the library as a whole; the first release's own bound for the small compiled step is 0.6.
    goals = {eager: 0.45, jit: 0.75} if small else {eager: 1.00, jit: 0.95}
    return [
        *compare("step", f"{work}; compiled, donated", times, "compiled, donated", goals),
        *compare("step", f"{work}; uncompiled, donated", times, "uncompiled, donated", {eager: 1.10 if small else 1.02}),
        *compare("step", f"{work}; uncompiled, pure", times, "uncompiled, pure", {eager: None}),
    ]
