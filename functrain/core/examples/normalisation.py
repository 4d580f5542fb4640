"""Gradients of the scale and the shift of normalised inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from functrain.core.examples.contribution import SHIFT, Rows, summed
from functrain.core.examples.tape import Make, Tape

_SCALE = "scale: a gradient for each example, sums of output gradients times normalised inputs"

# (inputs, scale, shift) -> normalised, scaled and shifted; and the sum over the positions that share a scale.
Normalise = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Sum = Callable[[Tensor], Tensor]


def layer_norm(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Layer normalisation with leaves as scale and shift."""
    return _layer_norm(tape, *args, **kwargs)


def _layer_norm(
    tape: Tape, input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    def normalise(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, scale, shift, eps)

    return _normalised(tape, input, weight, bias, normalise, lambda grad: summed(grad.reshape(tape.size, -1, *shape)))


def group_norm(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Group normalisation with leaves as scale and shift, of images `(B, C, *S)`."""
    return _group_norm(tape, *args, **kwargs)


def _group_norm(
    tape: Tape, input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    def normalise(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.group_norm(x.flatten(0, 1), groups, scale, shift, eps)

    def total(grad: Tensor) -> Tensor:
        grad = grad.unflatten(0, (tape.size, -1))
        return grad.flatten(3).sum((1, 3)) if grad.ndim > 3 else summed(grad)

    return _normalised(tape, input, weight, bias, normalise, total)


def _normalised(tape: Tape, input: Tensor, weight: Tensor | None, bias: Tensor | None, normalise: Normalise, total: Sum) -> Any:
    """w x̂ + b in one call; x̂ itself is computed once more where the gradient of w is wanted."""
    scale, shift = tape.leaf(weight), tape.leaf(bias)
    if scale is None or (bias is not None and shift is None) or tape.known(input):
        return None
    x = tape.physical(input)
    y = normalise(x, scale.of(x), None if shift is None else shift.value)
    makes: list[tuple[int, Make]] = [(scale.place, lambda x, grad: Rows(total(grad * normalise(x, None, None)), _SCALE))]
    if shift is not None:
        makes.append((shift.place, lambda x, grad: Rows(total(grad), SHIFT)))
    return tape.record(x, y, makes, x.shape)
