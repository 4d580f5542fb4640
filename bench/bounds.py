"""Bounds: what no step on this machine can be faster than, by flops, by bytes, by dispatch, at rates measured in this run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import functrain as ft
from bench.networks import Given, Ours, Work

# Layers whose outputs have to be in memory; what is pointwise between them could be fused.
_STORED = (nn.Linear, nn.Conv2d, nn.LSTM)


class Bound(NamedTuple):
    """What a call needs, and the least time for each need alone, in µs."""

    flops: float
    bytes: float
    calls: float
    flops_us: float
    bytes_us: float
    calls_us: float

    @property
    def by(self) -> str:
        """What bounds it: the need that takes longest."""
        return max(("flops", "bytes", "dispatch"), key=lambda name: getattr(self, name.replace("dispatch", "calls") + "_us"))

    @property
    def us(self) -> float:
        """The least time of a call: needs may overlap, so the largest and not the sum."""
        return max(self.flops_us, self.bytes_us, self.calls_us)

    def per(self, count: int) -> Bound:
        """The same for one of `count` equal parts of a call."""
        return Bound(*(value / count for value in self))


class Needs(NamedTuple):
    """Flops of matrix products and convolutions; bytes read and written; bytes at hand, which say what cache they fit."""

    flops: float
    bytes: float
    held: float

    def times(self, count: int, members: int = 1) -> Needs:
        """The needs of `count` calls one after the other, for each of `members` at once."""
        return Needs(self.flops * count * members, self.bytes * count * members, self.held * members)


def bound(needs: Needs, operators: int | None = None, kind: torch.dtype = torch.float32) -> Bound:
    """The bound of something compiled, which pays for one call; or, not compiled, for so many operators."""
    calls_us = compiled_call_us() if operators is None else operators * operator_us()
    flops_us = needs.flops / flops_per_us(kind) if needs.flops else 0.0
    calls = 1 if operators is None else operators
    return Bound(needs.flops, needs.bytes, calls, flops_us, needs.bytes / bytes_per_us(needs.held), calls_us)


# --- what a workload needs -------------------------------------------------------------------------------------


def gradient_needs(work: Work) -> Needs:
    """Forward and backward pass, from shapes.

    Bytes: params read in both passes, gradients written once; the batch read twice; each layer's output written once and read
    twice (by the next layer, by the backward pass), its gradient written and read.
    """
    stored: list[int] = []
    # On tensors without memory, where an LSTM is made of products that can be counted.
    module, batch = work.module().to("meta"), {name: leaf.to("meta") for name, leaf in work.batch.items()}
    for layer in module:
        if isinstance(layer, _STORED):
            layer.register_forward_hook(lambda _, __, out: stored.append(size_of(out)))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(module(batch["x"]), batch["y"]).backward()
    params = size_of(list(module.parameters()))
    return Needs(counter.get_total_flops(), 3 * params + 2 * size_of(work.batch) + 5 * sum(stored), 2 * params + sum(stored))


def update_needs(params: Any, state: Any, flops: float = 0.0) -> Needs:
    """An optimizer's update: gradients read once, params and the optimizer's state read and written."""
    moved = 3 * size_of(params) + 2 * size_of(state)
    return Needs(flops, moved, 2 * size_of(params) + size_of(state))


def step_needs(work: Work) -> Needs:
    """A gradient and AdamW's update with its two moments."""
    gradient, params = gradient_needs(work), list(work.module().parameters())
    update = update_needs(params, [params, params])
    return Needs(gradient.flops, gradient.bytes + update.bytes, gradient.held + update.held)


def size_of(tree: Any) -> int:
    """Bytes of the tensors in a tree."""
    return sum(leaf.nbytes for leaf in ft.tree.leaves(tree) if isinstance(leaf, Tensor))


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        # Of lists of tensors, PyTorch's CPU kernels dispatch an operator for each.
        self.count += len(arguments[0]) if operator.__name__.startswith("_foreach") else 1
        return operator(*arguments, **(keywords or {}))


def operators(run: Callable[[], Any]) -> int:
    """How many operators PyTorch dispatches in a call, views included, and each tensor of a `_foreach` operator."""
    with _Counted() as counted:
        run()
    return counted.count


# --- what the machine can do -----------------------------------------------------------------------------------


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own; without, it takes a hundred times longer."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def flops_per_us(kind: torch.dtype) -> float:
    """Of a product of two 1024 × 1024 matrices."""
    square = torch.full((1024, 1024), 0.5, dtype=kind)
    return 2 * 1024**3 / _fastest_us(lambda: torch.mm(square, square))


def bytes_per_us(held: float) -> float:
    """Of numbers negated in place, bytes read and written, among as many as are at hand: those that fit a cache move faster."""
    # At least 256 KiB: a pass over less is bound by its dispatch.
    return _pass_rate(1 << max(18, min(28, round(held).bit_length())))


@cache
def _pass_rate(held: int) -> float:
    # In place: a copy also reads what it is about to overwrite, and was a third slower.
    numbers = torch.zeros(held // 4)
    return 2 * held / _fastest_us(numbers.neg_)


@cache
def operator_us() -> float:
    """One operator on one number, out of autograd's sight."""
    one = torch.ones(1)
    return _fastest_us(lambda: torch.neg(one))


@cache
def compiled_call_us() -> float:
    """A call of our compiled step that has one number to update: Python around the graph, and entering it."""
    one = {"w": torch.ones(1)}
    return _fastest_us(Ours(ft.compiled(ft.step(Given(), ft.optim.sgd(0.1))), one, one))


def _fastest_us(run: Callable[[], Any], turns: int = 20, turn: float = 0.01) -> float:
    run()
    fastest, begin = float("inf"), time.perf_counter()
    for _ in range(turns):
        calls, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < turn or not calls:
            run()
            calls += 1
        fastest = min(fastest, passed / calls)
        if start > begin + 100 * turn:
            break
    return fastest * 1e6
