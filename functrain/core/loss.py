"""The contract between a user's loss and the gradients taken of it: per-example losses, summed here and nowhere else."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import DonatedError, LossError
from functrain.core.transforms import constant, inside_tracing, inside_transform
from functrain.core.tree import Tree


class Losses(NamedTuple):
    """What a loss may return in full; `losses` alone and `(losses, weights)` are short for it.

    - `losses`: one for each example, of any shape `(N, …)` with at least one dimension, floating;
    - `weights`: one for each loss, the same shape or a prefix of it (default: ones);
    - `aux`: a tree of further measures, each of the shape of `losses`; they are summed and averaged as the losses are;
    - `carry`: what the next call will be given (only of a loss that declares `carry`).
    """

    losses: Tensor
    weights: Tensor | None = None
    aux: Tree = None
    carry: Tree = None


class Totals(NamedTuple):
    """The sums over a batch: Σ wᵢ lossᵢ, Σ wᵢ, Σ wᵢ auxᵢ, and the carry."""

    loss: Tensor
    weight: Tensor
    aux: Tree
    carry: Tree


def declared(loss: Callable[..., Any]) -> frozenset[str]:
    """Which of `carry` and `key` a loss declares as a keyword.

    >>> sorted(declared(lambda params, batch, *, carry, key: None))
    ['carry', 'key']
    """
    if not callable(loss):
        raise LossError(f"a loss must be a function of (params, batch), got {type(loss).__name__}")
    return frozenset(inspect.signature(loss).parameters) & {"carry", "key"}


def total(
    loss: Callable[..., Any],
    uses: frozenset[str],
    params: Tree,
    batch: Tree,
    size: int,
    carry: Tree,
    key: Tensor | None,
) -> Totals:
    """Call a loss on a batch of `size` examples and add up what it returns, holding it to its contract (`LossError`)."""
    keywords = {name: value for name, value in (("carry", carry), ("key", key)) if name in uses}
    try:
        output = loss(params, batch, **keywords)
    except StopIteration as error:
        # Outside, it would end a loop in silence.
        raise LossError("the loss raised StopIteration: an iterator that it reads has ended") from error
    except (RuntimeError, IndexError, ValueError) as error:
        if _emptied(params):
            raise DonatedError(
                "these params belong to a state that was given to a donating step, which took their buffers over: use those of "
                "the state that the step returned"
            ) from error
        raise
    result = normalised(output, "carry" in uses)
    losses = _checked(result.losses, size)
    # A sum in half precision has 8 or 11 bits, or overflows at 65504.
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    count = losses.numel()
    if result.weights is None:
        weight = torch.full((), float(count), dtype=torch.float64, device=losses.device)
        weights = None
    else:
        weights = _expanded(result.weights, losses)
        losses = losses * weights
        weight = _summed(constant(weights))
    aux = result.aux
    if aux is not None:
        aux = tree.map(lambda leaf: _aux_total(leaf, weights, losses.shape), aux)
    return Totals(losses.sum(), weight, aux, result.carry)


def missing(uses: frozenset[str], carry: Tree, key: Tensor | None) -> None:
    """Raise `LossError` when a loss is not given what it declares, or is given a carry that it does not."""
    if "carry" in uses and carry is None:
        raise LossError("the loss declares `carry`, and none was given: start with step.init(params, carry=…)")
    if "carry" not in uses and carry is not None and tree.leaves(carry):
        raise LossError("a carry was given, and the loss does not declare it: write loss(params, batch, *, carry)")
    if "key" in uses and key is None:
        raise LossError("the loss declares `key`, and none was given: pass key=ft.random.key(seed)")


def normalised(output: Any, carries: bool) -> Losses:
    """What a loss returned, in full, whichever short form it used; `LossError` when it is none of them."""
    if isinstance(output, Losses):
        result = output
    elif carries:
        if not isinstance(output, tuple) or len(output) != 2:
            raise LossError(f"a loss that declares `carry` returns (losses, carry), got {_described(output)}")
        inner = normalised(output[0], False)
        result = inner._replace(carry=output[1])
    elif isinstance(output, tuple) and len(output) == 2:
        result = Losses(*output)
    else:
        result = Losses(output)
    if carries and result.carry is None:
        raise LossError("a loss that declares `carry` has to return it: (losses, carry) or Losses(…, carry=carry)")
    return result


def measures(aux: Tree, others: Iterable[str] = ()) -> dict[str, Any]:
    """The leaves of `aux` by name: `aux.loss` and the like where a step uses the plain name, `aux` for a bare tensor.

    `others` are names that the step at hand uses besides: those of its schedules.
    """
    if aux is None:
        return {}
    taken = {"loss", "weight", "skipped", *others}
    return {f"aux.{name}" if name in taken else name or "aux": leaf for name, leaf in tree.named(aux).items()}


def _emptied(params: Tree) -> bool:
    leaves = tree.leaves(params)
    return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.shape == (0,) for leaf in leaves)


def _checked(losses: Any, size: int) -> Tensor:
    if not isinstance(losses, Tensor):
        raise LossError(f"a loss returns a tensor of per-example losses, got {_described(losses)}")
    if losses.ndim == 0:
        raise LossError(
            "the loss returned a 0-d tensor (a mean or a sum); return one loss for each example, for instance with "
            "reduction='none': functrain adds and divides once, so that parts and ragged batches come out right"
        )
    if not losses.is_floating_point():
        raise LossError(f"per-example losses must be floating, got {losses.dtype}")
    if losses.numel() == 0:
        raise LossError(f"the loss returned no losses (shape {tuple(losses.shape)}): the batch is empty")
    if losses.shape[0] % size:
        raise LossError(
            f"the loss returned losses of shape {tuple(losses.shape)} for a batch of N = {size}: expected (N, …), or "
            "(N · T, …) with the time folded in; to leave some out, give them the weight 0: (losses, weights)"
        )
    return losses


def _expanded(weights: Any, losses: Tensor) -> Tensor:
    if not isinstance(weights, Tensor):
        raise LossError(f"weights must be a tensor, got {_described(weights)}")
    if weights.shape != losses.shape[: weights.ndim]:
        raise LossError(
            f"weights have shape {tuple(weights.shape)}, losses {tuple(losses.shape)}: expected the same shape, or a prefix"
        )
    if weights.is_cpu and not inside_transform() and not inside_tracing() and bool((weights < 0).any()):
        raise LossError(f"weights must not be negative, the smallest is {weights.min().item():g}")
    return weights.to(losses.dtype).reshape(*weights.shape, *(1,) * (losses.ndim - weights.ndim)).expand_as(losses)


def _summed(weights: Tensor) -> Tensor:
    total = weights.sum(dtype=torch.float64)
    if weights.is_cpu and not inside_transform() and not inside_tracing():
        return total
    # Negative weights cannot be raised here: they are where the mean is taken, or give params that are no numbers.
    return torch.where((weights < 0).any(), -math.inf, total)


def _aux_total(leaf: Tensor, weights: Tensor | None, shape: torch.Size) -> Tensor:
    if leaf.shape != shape:
        raise LossError(f"aux measures are per example: expected the losses' shape {tuple(shape)}, got {tuple(leaf.shape)}")
    leaf = leaf.detach()
    leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    return (leaf if weights is None else leaf * weights.detach()).sum()


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
