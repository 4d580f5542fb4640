"""Gradient centralisation: what all inputs of an output share is taken off its gradient.

    g ← g − mean(g),   the mean over all but the first dimension, of leaves of two dimensions or more

Source: Yong, Huang, Hua, Zhang, "Gradient centralization: a new optimization technique for deep neural networks", ECCV 2020.
"""

from __future__ import annotations

from torch import Tensor

from functrain.core.optim.base import Optimizer
from functrain.core.optim.part import part, wide


def centralise() -> Optimizer:
    """Gradients whose mean over the inputs of each output is zero; vectors and numbers pass through.

    The first dimension is taken for that of the outputs, as torch's layers have it. The mean is taken in float32 or better.

    >>> import torch
    >>> part = centralise()
    >>> params, grads = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    >>> part.update(grads, part.init(params), params)[0]
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """

    def rule(grads: list[Tensor], params: list[Tensor], now: dict[str, Tensor]) -> list[Tensor]:
        return [_centred(leaf) if leaf.ndim > 1 else leaf for leaf in grads]

    return part("centralise", {}, rule)


def _centred(leaf: Tensor) -> Tensor:
    exact = wide(leaf)
    return (exact - exact.mean(tuple(range(1, leaf.ndim)), keepdim=True)).to(leaf.dtype)
