"""Order statistics over parts: the values that they hold at each coordinate, in order, with what is not a number set apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.reduce.base import Reducer, visible
from functrain.core.reduce.gathered import columns, cut, gathered, joined
from functrain.core.transforms import inside_tracing
from functrain.core.tree import Tree

Combine = Callable[[Sequence[Tensor], Tensor | None], Tensor]

# As many numbers as torch works on with one thread: waiting for others after each of a network's many small operations can
# take longer than the operations (30 times, on two cores that others use too).
_BLOCK = 1 << 15


def coordinatewise(name: str, combine: Combine) -> Reducer:
    """A reducer out of `combine(values, odd) -> value`, which acts on each coordinate by itself.

    - `values`: K tensors `(P,)`, the parts' mean gradients at P coordinates. NaNs have become extremes, taking turns: at each
      coordinate the first is +∞, the second −∞, and so on. So as many are above all others as below, up to one;
    - `odd`: `(P,)` bool: where that one is: one more +∞ than −∞. None where nothing is missing anywhere;
    - returns `(P,)`; what is not finite in it becomes NaN.

    Leaves are cut into blocks, and small ones joined.
    """

    def whole(rows: Sequence[Tree], weights: Tensor) -> Tree:
        flat, specs = zip(*map(tree.flatten, rows))
        results = list(flat[0])
        for places in joined(results, _BLOCK):
            blocks = [_sifted(block, combine) for block in cut(columns(flat, places), _BLOCK)]
            pieces = torch.cat(blocks).split([results[place].numel() for place in places])
            for place, piece in zip(places, pieces):
                results[place] = piece.reshape(results[place].shape)
        return tree.unflatten(specs[0], results)

    return gathered(name, whole, stacked=False, robust=True)


def _sifted(values: Sequence[Tensor], combine: Combine) -> Tensor:
    """`combine`, after NaNs have been made extremes: at once if need be, else when one has shown in the result."""
    if visible(values[0]):
        result = combine(values, None)
        # A sum that overflows costs the time of the long way alone.
        if math.isfinite(result.sum().item()):
            return result
    result = combine(*_extremes(values))
    return torch.where(result.abs() < math.inf, result, math.nan)


def _extremes(values: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    extreme, filled = torch.full_like(values[0], math.inf), []
    for value in values:
        missing = value.isnan()
        filled.append(torch.where(missing, extreme, value))
        extreme = torch.where(missing, -extreme, extreme)
    return filled, extreme < 0


# --- sorting -------------------------------------------------------------------------------------------------------


def ordered(values: Sequence[Tensor], first: int, last: int) -> list[Tensor]:
    """The values of ranks `first` to `last` (from 0, inclusive) among K tensors `(P,)`, elementwise. A NaN reaches every rank.

    By a network of minima and maxima: torch.sort over K = 8 rows of 2 million numbers took 700 ms (topk, kthvalue and median
    400 to 470), the network for both middle ranks 22 in blocks that fit the cache; stacking the rows takes 50.

    >>> ordered([torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0])], 0, 1)
    [tensor([1.]), tensor([2.])]
    """
    # The network grows as K log² K; torch.sort catches up beyond 64, and a graph of 16 takes 15 s to compile, of 32 already 40.
    if len(values) > (16 if inside_tracing() else 64):
        ranks = torch.stack(list(values)).sort(0).values
        return list(torch.where(ranks[-1].isnan(), ranks[-1], ranks[first : last + 1]).unbind(0))
    wires = list(values)
    for low, high, smaller, larger in _network(len(values), first, last):
        a, b = wires[low], wires[high]
        if smaller:
            wires[low] = torch.minimum(a, b)
        if larger:
            wires[high] = torch.maximum(a, b)
    return wires[first : last + 1]


Comparator = tuple[int, int, bool, bool]


@functools.lru_cache(maxsize=64)
def _network(count: int, first: int, last: int) -> tuple[Comparator, ...]:
    """Batcher's merge exchange for `count` wires, without the comparators that no wire from `first` to `last` depends on.

    Each comparator: the wire of the smaller value, that of the larger, and whether either is still needed.

    Source: Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M; Batcher, "Sorting networks and their
    applications", AFIPS 1968.
    """
    needed, kept = set(range(first, last + 1)), []
    for low, high in reversed(_merge_exchange(count)):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def _merge_exchange(count: int) -> list[tuple[int, int]]:
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    width = top
    while width:
        jump, residue, distance = top, 0, width
        while True:
            pairs += [(wire, wire + distance) for wire in range(count - distance) if wire & width == residue]
            if jump == width:
                break
            distance, jump, residue = jump - width, jump // 2, width
        width //= 2
    return pairs
