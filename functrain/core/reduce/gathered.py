"""Reducers that have to see every part: merging gathers, and finishing combines the parts' mean gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import LossError, TreeError
from functrain.core.reduce.base import Gradient, Reducer, add, divided, mean_of, visible
from functrain.core.tree import Tree

Rows = tuple[Gradient, ...]
Combine = Callable[..., Tree]

# How many numbers of each part are taken at a time: what is made of them stays in the processor's cache. Distances between
# 8 parts of 2 million (one thread) took 45 ms by torch.pdist in blocks, and 5.1 s by subtraction in one piece.
# Fixed, so that sums are associated the same way everywhere.
BLOCK = 1 << 16


def lift(gradient: Gradient) -> Rows:
    """One part, as a row of one."""
    return (gradient,)


def merge(left: Rows, right: Rows) -> Rows:
    """The parts of both, in order: the free monoid, so nothing is computed before all parts are there."""
    return left + right


def gathered(
    name: str, combine: Combine, *, keyed: bool = False, stacked: bool = True, robust: bool = False, least: int = 1
) -> Reducer:
    """A reducer out of `combine(rows, weights) -> grads`.

    - `rows`: like params, each leaf `(K, …)`: the mean gradient of each of K parts, in order. Not `stacked`: a list of K trees
      like params, which spares a copy of all parts;
    - `weights`: `(K,)` float64: the weight of each part;
    - returns grads like params, without the K.

    Keyed: `combine(rows, weights, key)`. Loss and aux are the weighted means over all examples, as always; those of a
    `robust` reducer leave out the parts whose loss is not finite, so that a run that survives them can go on. A part whose
    weights sum to zero has no mean gradient: `LossError`, where that can be seen. With fewer parts than `least` the reducer
    means nothing: `parallel` refuses them.
    """

    def finish(parts: Rows, *key: Tensor) -> Gradient:
        weights = torch.stack([part.weight for part in parts])
        check_parts(weights)
        means = [divided(part.grads, part.weight) for part in parts]
        reported = [part._replace(grads=(), carry=None) for part in parts]
        whole: Gradient = tree.tree_reduce(add, [_finite(part) for part in reported] if robust else reported)  # type: ignore[arg-type]
        grads = combine(tree.stack(means) if stacked else means, weights, *key)
        _check_combined(name, grads, parts[0].grads)
        return mean_of(whole, check=not robust)._replace(grads=grads, weight=tree.tree_reduce(torch.add, weights.unbind()))

    return Reducer(name, merge, finish, lift, keyed=keyed, gathers=True, least=least)


def _check_combined(name: str, grads: Tree, like: Tree) -> None:
    """Raise `TreeError` for what is not like params: added to them, it would be broadcast in silence."""
    spec = tree.structure(like)
    for place, (leaf, expected) in enumerate(zip(tree.leaves_like(spec, grads, like), tree.leaves(like))):
        if not isinstance(leaf, Tensor) or leaf.shape != expected.shape:
            got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TreeError(
                f"{name}: combine(rows, weights) gave {tree.paths(like)[place]!r} as {got}, params have "
                f"{tuple(expected.shape)}: reduce the first dimension of every row leaf, K, and keep the others"
            )


def _finite(part: Gradient) -> Gradient:
    """What a part reports, or nothing at all where its loss is not finite."""
    finite = part.loss.isfinite()
    return tree.map(lambda leaf: torch.where(finite, leaf, torch.zeros_like(leaf)), part)


def check_parts(weights: Tensor) -> None:
    """Raise `LossError` naming the parts whose weights `(K,)` sum to zero."""
    if visible(weights) and not bool(weights.all()):
        empty = [place + 1 for place, weight in enumerate(weights.tolist()) if not weight]
        raise LossError(
            f"the weights of part {', '.join(map(str, empty))} of {len(weights)} sum to zero: it has no mean gradient that a "
            "reducer could compare with the others'; take fewer parts, or leave such examples out"
        )


# --- what a reducer may ask of the rows ----------------------------------------------------------------------------


def squared_distances(rows: Sequence[Tree]) -> Tensor:
    """‖gⱼ − gₖ‖² between all of K trees: `(K, K)`, float64, summed over leaves; not finite where a gradient is not.

    >>> squared_distances([{"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}])
    tensor([[ 0., 25.],
            [25.,  0.]], dtype=torch.float64)
    """
    # Differences, not the Gram matrix: near each other, parts' distances would drown in rounding.
    if not all(visible(leaf) for leaf in tree.leaves(rows[0])):
        return _sum_over_blocks(rows, lambda block: torch.stack([(block - row).square().sum(1) for row in block]))
    pairs = _sum_over_blocks(rows, lambda block: torch.pdist(block).square())
    above = torch.triu_indices(len(rows), len(rows), 1)
    half = pairs.new_zeros(len(rows), len(rows)).index_put(tuple(above), pairs)
    return half + half.T


def inner_products(rows: Sequence[Tree]) -> Tensor:
    """⟨gⱼ, gₖ⟩ between all of K trees: `(K, K)`, float64, summed over leaves; not finite where a gradient is not.

    >>> inner_products([{"w": torch.ones(2)}, {"w": torch.tensor([3.0, 4.0])}])
    tensor([[ 2.,  7.],
            [ 7., 25.]], dtype=torch.float64)
    """
    return _sum_over_blocks(rows, lambda block: block @ block.T)


def _sum_over_blocks(rows: Sequence[Tree], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ `function(block)` over all columns of all leaves, in blocks `(K, P)`, float64."""
    flat = [tree.leaves(row) for row in rows]
    terms = [
        function(torch.stack(block).double())
        for places in joined(flat[0], BLOCK)
        for block in cut(columns(flat, places), BLOCK)
    ]
    return sum(terms[1:], terms[0])


def joined(leaves: Sequence[Tensor], size: int) -> list[list[int]]:
    """The places of leaves to take as one: small ones of a dtype, or all of it where values are not seen (in a graph)."""
    groups: dict[object, list[int]] = {}
    for place, leaf in enumerate(leaves):
        alone = visible(leaf) and leaf.numel() >= size
        groups.setdefault((leaf.dtype, place if alone else None), []).append(place)
    return list(groups.values())


def columns(flat: Sequence[Sequence[Tensor]], places: Sequence[int]) -> list[Tensor]:
    """The leaves at these places of each of K flat trees, as one vector each: K of `(P,)`."""
    own = [[leaves[place].reshape(-1) for place in places] for leaves in flat]
    return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in own]


def cut(vectors: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """K vectors `(P,)` in blocks of K vectors of at most `size`; in a graph, whose compiler cuts for itself, in one piece."""
    return zip(*(vector.split(size) for vector in vectors)) if visible(vectors[0]) else iter([tuple(vectors)])


def select(rows: Sequence[Tree], shares: Tensor) -> Tree:
    """Σₖ shareₖ gₖ over the trees whose share `(K,)` is not zero: what another one holds (NaN) is not touched.

    >>> select([{"w": torch.tensor([2.0, 4.0])}, {"w": torch.tensor([torch.nan, 0.0])}], torch.tensor([0.5, 0.0]))
    {'w': tensor([1., 2.])}
    """
    if visible(shares) and not shares.requires_grad:
        chosen = [(share, row) for share, row in zip(shares.tolist(), rows) if share != 0]
        if chosen:
            factors, rows = zip(*chosen)
            return tree.map(lambda *members: _weighted(members, factors), *rows)

    def one(*members: Tensor) -> Tensor:
        terms = [
            torch.where(share != 0, leaf * share.to(leaf.dtype), torch.zeros_like(leaf))
            for share, leaf in zip(shares.unbind(0), wide(members))
        ]
        return sum(terms[1:], terms[0]).to(members[0].dtype)

    return tree.map(one, *rows)


def _weighted(members: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    first, *rest = wide(members)
    total = first * factors[0]
    for leaf, factor in zip(rest, factors[1:]):
        total = torch.add(total, leaf, alpha=factor)
    return total.to(members[0].dtype)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in a dtype that sums can be taken in: at least float32."""
    return [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in tensors]
