"""Gradients of a table of embeddings: rows that tokens look up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from functrain.core.examples.contribution import Contribution, exact, weighted
from functrain.core.examples.linear import TRAFFIC
from functrain.core.examples.tape import Tape


class Embedding(Contribution):
    """A table `(V, E)` looked up at tokens `(N, L)`, with output gradients δ `(N, L, E)`: row v of gᵢ is Σ δᵢₗ over tᵢₗ = v.

    ‖gᵢ‖² = Σₖₗ [tᵢₖ = tᵢₗ] δᵢₖ·δᵢₗ: pairs of equal tokens, and no table for each example (Li et al. 2021).
    """

    def __init__(self, tokens: Tensor, outputs: Tensor, rows: int, padding: int | None) -> None:
        if padding is not None:
            outputs = outputs.masked_fill((tokens == padding).unsqueeze(2), 0)
        self.tokens, self.outputs, self.rows = tokens, outputs, rows
        self.elements = rows * outputs.shape[2]
        self.by_pairs = tokens.shape[1] ** 2 < rows * TRAFFIC
        known = "norms from pairs of equal tokens" if self.by_pairs else "a table for each example"
        self.algebra = f"embedding: {known}"

    def each(self, start: int, stop: int) -> Tensor:
        outputs = self.outputs[start:stop]
        first = torch.arange(stop - start, device=outputs.device).unsqueeze(1) * self.rows
        grads = outputs.new_zeros((stop - start) * self.rows, outputs.shape[2])
        grads = grads.index_add(0, (self.tokens[start:stop] + first).flatten(), outputs.flatten(0, 1))
        return grads.view(stop - start, self.rows, -1)

    def norms(self) -> Tensor | None:
        if not self.by_pairs:
            return None
        outputs = self.outputs.to(exact(self.outputs.dtype))
        equal = self.tokens.unsqueeze(1) == self.tokens.unsqueeze(2)
        return torch.bmm(outputs, outputs.mT).masked_fill(~equal, 0).sum((1, 2)).clamp_min(0).sqrt()

    def scaled(self, scales: Tensor) -> Tensor:
        outputs = weighted(scales, self.outputs)
        table = outputs.new_zeros(self.rows, outputs.shape[2])
        return table.index_add(0, self.tokens.flatten(), outputs.flatten(0, 1))


# --- rule -----------------------------------------------------------------------------------------------------------


def embedding(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of a leaf, looked up at tokens of any shape."""
    return _looked_up(tape, *args, **kwargs)


def _looked_up(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    leaf = tape.leaf(weight)
    if leaf is None or leaf.flipped or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    tokens = tape.physical(input)
    size, (rows, wide) = len(tokens), leaf.value.shape
    padding = None if padding_idx is None else padding_idx % rows
    y = F.embedding(tokens, leaf.live, padding_idx)

    def table(tokens: Tensor, grad: Tensor) -> Contribution:
        return Embedding(tokens.reshape(size, -1), grad.reshape(size, -1, wide), rows, padding)

    return tape.record(tokens, y, [(leaf.place, table)], y.shape)
