"""The mean of examples' gradients, none of which is longer than a given norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.reduce.base import Gradient, Reducer, add, mean_of, squared_norm

Scale = Callable[[Tensor], Tensor]


def clip_per_example(norm: float) -> Reducer:
    """Each example's gradient clipped to the length `norm`, then the mean: no example pulls harder than that.

    With gᵢ = wᵢ ∇lossᵢ the gradient of example i over all leaves together and C the norm,

        Σᵢ min(1, C / ‖gᵢ‖) gᵢ / Σᵢ wᵢ.

    The weight is part of the gradient that is clipped; an example of weight 0 contributes nothing. Where an example has several
    losses, `(N, T)`, gᵢ is the gradient of their weighted sum, and Σ wᵢ counts them all. Loss and aux are those of the
    plain mean. The number of parts makes no difference; of gradients given by hand, `lift` clips each as one example's.

    An example whose gradient holds a NaN or an infinity makes the result NaN, as no factor takes it out again: `ft.guard` skips
    such a step.

    Raises `ArgumentError` for a norm that is not a finite number above 0; at the first batch `LossError` for a
    loss whose examples share buffers (batch norm).

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, for one example.

    >>> import functrain as ft, torch
    >>> clipped = ft.parallel(ft.grad(lambda w, batch: batch @ w), 1, ft.reduce.clip_per_example(1.0))
    >>> clipped.finished(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.2, 0.0], [0.0, 0.0]])).grads * 3
    tensor([0.8000, 0.8000])
    """
    scale = clipping(number("clip_per_example", "norm", norm, "the length that no example's gradient may exceed"))
    return Reducer(f"clip_per_example({norm:g})", add, mean_of, lifting(scale), scale=scale)


def clipping(norm: float) -> Scale:
    """The factors min(1, C / ‖gᵢ‖) `(N,)` for the norms `(N,)` of examples' gradients; 1 for the norm 0.

    >>> import torch
    >>> clipping(2.0)(torch.tensor([0.0, 1.0, 4.0]))
    tensor([1.0000, 1.0000, 0.5000])
    """
    return lambda norms: (norm / norms).clamp(max=1.0)


def lifting(scale: Scale) -> Callable[[Gradient], Gradient]:
    """What scales a gradient as that of one example."""

    def lift(gradient: Gradient) -> Gradient:
        (factor,) = scale(squared_norm(gradient.grads).sqrt().unsqueeze(0))
        return gradient._replace(grads=tree.map(lambda leaf: leaf * factor.to(leaf.dtype), gradient.grads))

    return lift


def number(of: str, name: str, value: Any, meaning: str, *, zero: bool = False) -> float:
    """The argument `name` of `of`, which is `meaning`, as a float; `ArgumentError` unless it is finite and above 0.

    With `zero`, 0 is allowed.

    >>> number("private", "noise", 1, "the noise multiplier")
    1.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf or not (value or zero):
        least = "at least 0" if zero else "above 0"
        raise ArgumentError(f"{of}: {name} must be a finite number {least}, got {value!r}: it is {meaning}")
    return float(value)
