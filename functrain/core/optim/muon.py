"""Muon: momentum of matrices, orthogonalised.

    b ← momentum · b + (1 − momentum) g
    u = momentum · b + (1 − momentum) g   (nesterov)   or   b
    x = u / max(‖u‖, ε),   then ns_steps times   x ← a x + (b A + c A²) x   with A = x xᵀ
    p ← p − lr · weight_decay · p
    p ← p − lr · s · x

x has the singular vectors of u, and singular values near 1. s is √max(1, M / N) for matrices (M, N) ("original"), or
0.2 √max(M, N) ("match_rms_adamw").

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is scalable for
LLM training", 2025; in the form of torch.optim.Muon.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number, larger
from functrain.core.optim.base import Hyper, Optimizer, check_params, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree

SCALES = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}
"""How much longer the step is for matrices (M, N)."""


class MuonState(NamedTuple):
    """The number of updates taken, the momentum b, the hyperparameters."""

    steps: Tensor
    momentum: Tree
    hyper: dict[str, Any]


def muon(
    lr: Hyper = 1e-3,
    *,
    momentum: Hyper = 0.95,
    nesterov: bool = True,
    weight_decay: Hyper = 0.1,
    eps: Hyper = 1e-7,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    ns_dtype: torch.dtype = torch.float32,
    adjust_lr_fn: str = "original",
) -> Optimizer:
    """Muon for matrices, and for kernels of more dimensions as matrices of (out, all others).

    Options and numbers are those of torch.optim.Muon, which takes matrices alone, with `ns_dtype=torch.bfloat16`: the dtype
    of the iteration, there. In float32 a population's member is its own run and a compiled step the plain one, which 8 bits
    do not allow (0.015 apart after 24 steps); and CPUs without bfloat16 are faster. `lr`, `momentum`,
    `weight_decay` and `eps` are numbers or schedules. An `init` raises `TreeError`, naming the paths, for params of fewer
    than two dimensions: train those by another optimizer, by way of `ft.optim.partition`.
    Raises `ArgumentError` for a negative number, a momentum outside [0, 1), and options that there are not.

    >>> optimizer = muon(0.1, weight_decay=0.0, ns_dtype=torch.float32)
    >>> params = {"w": torch.zeros(2, 2)}
    >>> updates, _ = optimizer.update({"w": torch.diag(torch.tensor([5.0, 1.0]))}, optimizer.init(params), params)
    >>> torch.linalg.svdvals(updates["w"])
    tensor([0.0797, 0.0722])
    """
    settings = {
        "lr": checked("lr", lr),
        "momentum": checked("momentum", momentum, 0.0, 1.0),
        "eps": checked("eps", eps),
        **decay_settings(weight_decay),
    }
    _check_options(ns_coefficients, ns_steps, ns_dtype, adjust_lr_fn)

    def direction(u: Tensor, eps: Number) -> Tensor:
        if not u.numel():
            return u
        matrix = u.flatten(1)
        x = orthogonalised(matrix.to(ns_dtype), eps, ns_coefficients, ns_steps).to(u.dtype)
        return (x * SCALES[adjust_lr_fn](*matrix.shape)).reshape(u.shape)

    def rule(do: Arithmetic, p: Leaf, g: Leaf, b: Leaf, n: Numbers) -> tuple[Leaf]:
        b = do.lerp_(b, g, n["fresh"])
        u = do.lerp(g, b, n["momentum"]) if nesterov else b
        x = do.each(lambda leaf: direction(leaf, n["eps"]), u)
        decayed(do, p, g, n, decoupled=True)
        do.descend(x, n["lr"])
        return (b,)

    options = {"nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype, "adjust_lr_fn": adjust_lr_fn}
    optimizer = leafwise("muon", MuonState, settings, _numbers, rule, buffers={"momentum": torch.zeros_like}, options=options)

    def init(params: Tree) -> Any:
        check_params(params)
        if wrong := [path for path, leaf in tree.named(params).items() if leaf.ndim < 2]:
            listed = ", ".join(tree.quoted(wrong))
            advice = "train other leaves by another optimizer with ft.optim.partition"
            raise TreeError(f"muon is defined for params of two or more dimensions, not for {listed}: {advice}")
        return optimizer.init(params)

    return dataclasses.replace(optimizer, init=init)


def _check_options(coefficients: Any, steps: Any, dtype: Any, scale: Any) -> None:
    three = isinstance(coefficients, tuple | list) and len(coefficients) == 3
    if not three or not all(isinstance(number, int | float) and math.isfinite(number) for number in coefficients):
        raise ArgumentError(f"ns_coefficients must be three finite numbers (a, b, c), got {coefficients!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps < 100:
        raise ArgumentError(f"ns_steps must be a whole number from 1 to 99, got {steps!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"ns_dtype must be a floating dtype, such as torch.bfloat16 or torch.float32, got {dtype!r}")
    if scale not in SCALES:
        raise ArgumentError(f"adjust_lr_fn must be one of {', '.join(tree.quoted(SCALES))}, got {scale!r}")


def _numbers(now: Numbers, count: Number, _: Numbers) -> tuple[Numbers, Numbers]:
    return {**now, "fresh": 1 - now["momentum"]}, {}


def orthogonalised(matrix: Tensor, eps: Number, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The matrix (M, N) with its singular values brought near 1 by Newton–Schulz iterations, in its dtype."""
    a, b, c = coefficients
    # The shorter side first: A is then the smaller of both Gram matrices.
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / larger(torch.linalg.vector_norm(x), eps).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
