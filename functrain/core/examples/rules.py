"""Which calls of torch have a better algebra than a copy of their weights for each example."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from functrain.core.examples.convolution import convolution, pooling
from functrain.core.examples.embedding import embedding
from functrain.core.examples.linear import addmm, linear, matmul, reversed_matmul
from functrain.core.examples.normalisation import group_norm, layer_norm
from functrain.core.examples.tape import LayoutError, Rule, Tape

# --- leaves that stay leaves ----------------------------------------------------------------------------------------


def _transposed(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    leaf = tape.leaf(args[0])
    if leaf is None or leaf.value.ndim != 2 or kwargs:
        return None
    if args[1:] and sorted(dim + 2 if dim < 0 else dim for dim in args[1:]) != [0, 1]:
        return None
    return tape.derive(args[0], leaf, operator.attrgetter("mT"), flips=True)


def _cast(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    leaf = tape.leaf(args[0])
    if leaf is None or kwargs or not all(isinstance(given, torch.dtype) and given.is_floating_point for given in args[1:]):
        return None
    return tape.derive(args[0], leaf, lambda value: func(value, *args[1:]), flips=False)


# --- examples as rows of one call, where vmap decomposes or takes one after the other -------------------------------


def _cross_entropy(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Losses of class scores: 20 µs where vmap takes 114."""
    plain = len(args) == 2 and kwargs.get("reduction") == "none" and kwargs.get("weight") is None
    if not plain or not tape.apart() or args[0].ndim < 2 or any(map(tape.known, args)):
        return None
    scores, targets = map(tape.physical, args)
    losses = func(scores.flatten(0, 1), targets.flatten(0, 1), **kwargs)
    return tape.batched(losses.unflatten(0, scores.shape[:2]))


def _attention(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Attention of queries, keys and values `(B, …)`: one fused call where vmap takes N."""
    plain = len(args) == 3 and kwargs.get("attn_mask") is None and not kwargs.get("dropout_p")
    if not plain or not tape.apart() or any(map(tape.known, args)):
        return None
    # Sides of fewer dimensions are shared by all in a way that rows of one call would not share them.
    if args[0].ndim < 3 or len({(side.ndim, side.shape[0]) for side in args}) > 1:
        return None
    sides = [tape.physical(side) for side in args]
    done = func(*(side.flatten(0, 1) for side in sides), **kwargs)
    return tape.batched(done.unflatten(0, sides[0].shape[:2]))


# --- what is no use ---------------------------------------------------------------------------------------------------


def _reshaped(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """A view here may be a copy in another layout, and the other way round: neither side may be written to from now on."""
    if not tape.relaid or not tape.apart() or not args or tape.known(args[0]):
        return None
    try:
        done = func(*args, **kwargs)
    except RuntimeError:
        # `view` of what is in another layout without the loss knowing of it.
        done = func(args[0].contiguous(), *args[1:], **kwargs)
    tape.freeze(args[0])
    tape.freeze(done)
    return done


def _strided(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Memory taken as it lies."""
    if tape.relaid and tape.apart():
        raise LayoutError(f"the loss calls {func.__name__}")


def _read(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """What is asked of a leaf and has no gradient."""
    return func(*args, **kwargs)


_READS: tuple[Any, ...] = (Tensor.detach, Tensor.item, Tensor.tolist, Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride)
_READS += (Tensor.is_floating_point, Tensor.__len__, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__format__)

_RESHAPES: tuple[Any, ...] = (Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.reshape_as, Tensor.flatten, Tensor.ravel)
_RESHAPES += (Tensor.contiguous, torch.reshape, torch.flatten, torch.ravel)

RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    Tensor.matmul: matmul,
    Tensor.mm: matmul,
    Tensor.__matmul__: matmul,
    Tensor.__rmatmul__: reversed_matmul,
    torch.addmm: addmm,
    torch.conv1d: partial(convolution, 1),
    torch.conv2d: partial(convolution, 2),
    torch.conv3d: partial(convolution, 3),
    F.max_pool2d: pooling,
    torch.max_pool2d: pooling,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.t: _transposed,
    torch.transpose: _transposed,
    Tensor.t: _transposed,
    Tensor.transpose: _transposed,
    Tensor.T.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.to: _cast,
    Tensor.float: _cast,
    Tensor.double: _cast,
    Tensor.half: _cast,
    Tensor.bfloat16: _cast,
    F.cross_entropy: _cross_entropy,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(_READS, _read),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys((torch.as_strided, Tensor.as_strided), _strided),
}
