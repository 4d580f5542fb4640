"""Randomness without a generator: keys are counters, and numbers are hashes of keys.

A key is an int64 tensor. A 0-d key stands for one stream; a key of shape `(N,)` holds one stream for each of N
examples. Whatever is drawn has the key's shape in front, so that randomness is cut, joined and vmapped together
with the batch: the same example at the same position gets the same numbers in every plan.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014); counter-based streams follow Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.core.errors import ArgumentError
from functrain.core.transforms import computed_once, inside_tracing, inside_transform

_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# Numbers and child keys come from the same hash: the tag keeps the two apart.
_NUMBERS = 0x6A09E667F3BCC908


def _shift(value: Tensor, by: int) -> Tensor:
    # int64 shifts carry the sign along; the mask makes the shift logical.
    return (value >> by) & ((1 << (64 - by)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def key(seed: int) -> Tensor:
    """The key of a seed: a 0-d int64 tensor.

    Any integer is a seed; they count modulo 2⁶⁴. Raises `ArgumentError` for anything else.

    >>> key(0).dtype, key(0).shape, bool(key(0) == key(1))
    (torch.int64, torch.Size([]), False)
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentError(f"a seed must be an int, got {seed!r}")
    wrapped = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mix(torch.tensor(wrapped, dtype=torch.int64) ^ _GOLDEN)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key out of a key and a number (a position, a layer, a rank); shapes broadcast.

    >>> fold_in(key(0), torch.arange(3)).shape
    torch.Size([3])
    """
    # Keys are hashes already: xor-ing the number in and mixing once more is enough, and compiles in half the time.
    return computed_once(_mix(key ^ data))


def split(key: Tensor, count: int) -> Tensor:
    """`count` independent keys: shape `(*key.shape, count)`.

    >>> split(key(0), 4).shape
    torch.Size([4])
    """
    return fold_in(key.unsqueeze(-1), torch.arange(count, device=key.device))


def example_keys(key: Tensor, size: int) -> Tensor:
    """One key for each of `size` examples: a 0-d key is split, a key of shape `(size,)` is taken as it is."""
    if key.ndim == 0:
        return split(key, size)
    if key.shape != (size,):
        raise ArgumentError(f"keys have shape {tuple(key.shape)}, the batch has N = {size}: expected () or ({size},)")
    return key


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """64 random bits an element, as int64: shape `(*key.shape, *shape)`."""
    counter = torch.arange(math.prod(shape), device=key.device).reshape(tuple(shape))
    return _hashed(key.reshape((*key.shape, *(1 for _ in shape))), counter)


def _hashed(key: Tensor, counter: Tensor) -> Tensor:
    # That the counter is xor-ed into a key matters: torch 2.13's CPU compiler writes out of bounds when an
    # arange is multiplied by a large constant directly.
    return _mix((key ^ _NUMBERS) ^ counter)


def uniform(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1): shape `(*key.shape, *shape)`, with as many random bits each as the dtype has digits.

    >>> bool((uniform(key(0), (1000,)).mean() - 0.5).abs() < 0.05)
    True
    """
    # More digits than the dtype holds would round the largest numbers up to 1 (seen in bfloat16: 2 in 1000).
    precision = {torch.float64: 53, torch.float16: 11, torch.bfloat16: 8}.get(dtype, 24)
    exact = dtype if precision == 53 else torch.float32
    return (_shift(bits(key, shape), 64 - precision).to(exact) * 2.0**-precision).to(dtype)


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers: shape `(*key.shape, *shape)`, by Box and Muller's transform of two halves of 64 bits.

    A pair of numbers comes of each hash: √(−2 log u) cos 2πv is in the first half of the elements, √(−2 log u) sin 2πv in
    the second. None is larger than 6.8, beyond which 1 in 10¹¹ should lie. Half precision is rounded from float32.

    >>> bool((normal(key(0), (1000,)).std() - 1).abs() < 0.1)
    True
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    count = math.prod(shape)
    half = (count + 1) // 2
    if key.ndim == 0 and key.is_cpu and half > _BLOCK and not inside_transform() and not inside_tracing():
        drawn = _in_blocks(key, half, exact)
    else:
        drawn = torch.cat(_pairs(key, 0, half, exact), -1)
    return drawn[..., :count].reshape((*key.shape, *shape)).to(dtype)


# Pairs at a time: what lies between the hash and the numbers stays in the cache (1.9 M numbers: 15 ms, at once 25 ms).
_BLOCK = 1 << 16


def _in_blocks(key: Tensor, half: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.empty(2, half, dtype=dtype, device=key.device)
    for start in range(0, half, _BLOCK):
        stop = min(start + _BLOCK, half)
        for row, numbers in zip(drawn, _pairs(key, start, stop, dtype)):
            row[start:stop] = numbers
    return drawn.reshape(-1)


def _pairs(key: Tensor, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers of each counter in start … stop−1, each `(*key.shape, stop − start)`."""
    hashed = _hashed(key.unsqueeze(-1), torch.arange(start, stop, device=key.device))
    radius = torch.sqrt(-2.0 * torch.log((_shift(hashed, 32).to(dtype) + 0.5) * 2.0**-32))
    angle = (hashed & 0xFFFFFFFF).to(dtype) * (2.0**-32 * 2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def dropout(x: Tensor, p: float, key: Tensor, *, channels: bool = False) -> Tensor:
    """Zeroes each element of `x` with probability `p` and divides the others by 1 − p.

    `x` is `(N, …)` with a key of shape `(N,)`, or of any shape with a 0-d key. Where the first dimension is
    a multiple of N (examples folded into it, as in `(N·T, F)`), each example's block uses its own key. With
    `channels`, whole channels (dimension 1) are zeroed. Raises `ArgumentError` when the first dimension does not fit
    the keys, or p is outside [0, 1].

    Source: Srivastava et al., "Dropout", JMLR 2014.

    >>> dropout(torch.ones(2, 3), 0.0, split(key(0), 2))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(f"a dropout probability must be in [0, 1], got {p}")
    if p == 0.0:
        return x
    if p == 1.0:
        return torch.zeros_like(x)
    shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if channels else tuple(x.shape)
    kept = _keep(key, shape, p)
    return x * kept.to(x.dtype) * (1.0 / (1.0 - p))


def _keep(key: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    if key.ndim == 0:
        return uniform(key, shape) >= p
    size = key.shape[0]
    if shape and shape[0] % size == 0:
        return uniform(key, (shape[0] // size, *shape[1:])).reshape(shape) >= p
    raise ArgumentError(
        f"dropout got {size} keys for a tensor of shape {shape}: examples come first, so that each has its own mask in every "
        f"plan; expected a first dimension of {size} or a multiple of it (batch_first=True, or transpose around the dropout)"
    )
