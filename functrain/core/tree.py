"""Trees: what params, batches and states are made of, and how they are named, joined, cut and folded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, TreeError

Tree = Any
Item = TypeVar("Item")

# optree's own functions, by the names that read well after `tree.`: nothing is wrapped, nothing costs more.
flatten: Callable[[Tree], tuple[list[Any], Any]] = optree.tree_flatten
unflatten: Callable[[Any, Iterable[Any]], Tree] = optree.tree_unflatten
leaves: Callable[[Tree], list[Any]] = optree.tree_leaves
structure: Callable[[Tree], Any] = optree.tree_structure


def leaves_like(spec: Any, tree: Tree, like: Tree) -> list[Any]:
    """The leaves of `tree`, which must have the structure `spec` of `like`: `TreeError` naming what differs."""
    try:
        return list(spec.flatten_up_to(tree))
    except ValueError as error:
        raise TreeError(f"expected a tree of another structure: {difference(like, tree)}") from error


def map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` to the leaves of `tree` (and, side by side, those of `rest`); `None` is an empty subtree.

    >>> map(lambda a, b: a + b, {"x": 1, "y": (2, None)}, {"x": 10, "y": (20, None)})
    {'x': 11, 'y': (22, None)}
    """
    try:
        return optree.tree_map(function, tree, *rest)
    except ValueError as error:
        if not rest or same_structure(tree, *rest):
            raise
        raise TreeError(f"trees of different structure cannot be mapped side by side: {difference(tree, *rest)}") from error


def same_structure(*trees: Tree) -> bool:
    """Whether all trees have the same structure.

    >>> same_structure({"a": 1}, {"a": 2}), same_structure({"a": 1}, {"b": 1})
    (True, False)
    """
    first, *rest = (structure(tree) for tree in trees)
    return all(other == first for other in rest)


def difference(*trees: Tree) -> str:
    """The first place where trees of different structure differ, in words."""
    first, *rest = (dict.fromkeys(paths(tree)) for tree in trees)
    for other in rest:
        missing = [path for path in first if path not in other]
        extra = [path for path in other if path not in first]
        if missing or extra:
            return "; ".join(
                f"{what} {', '.join(quoted(names[:3]))}{' …' if len(names) > 3 else ''}"
                for what, names in (("missing", missing), ("unexpected", extra))
                if names
            )
    return "the same paths, but containers of different types"


def quoted(names: Iterable[str]) -> list[str]:
    """Each name in quotes, for messages."""
    return [repr(name) for name in names]


def entry_name(entry: Any) -> str:
    """How an entry of an optree accessor (a key, an index, a field) is called in a dotted name."""
    return str(getattr(entry, "field", entry.entry))


def paths(tree: Tree, separator: str = ".") -> list[str]:
    """The unique dotted name of every leaf, in flattening order.

    Raises `TreeError` where two leaves would have the same name (a key that holds the separator).

    >>> paths({"layer": {"weight": 1.0, "bias": 2.0}, "scale": [3.0]})
    ['layer.bias', 'layer.weight', 'scale.0']
    """
    names = [separator.join(entry_name(entry) for entry in accessor) for accessor in optree.tree_accessors(tree)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TreeError(f"two leaves have the name {twice!r}: rename a key that holds {separator!r}")
    return names


def named(tree: Tree, separator: str = ".") -> dict[str, Any]:
    """The leaves by dotted name: what `namedparams` is elsewhere.

    >>> named({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    return dict(zip(paths(tree, separator), leaves(tree)))


def weights(params: Tree) -> Tree:
    """The weights among `params`, as `{name: tensor}`: leaves of two dimensions or more, so no biases or norm scales.

    >>> list(weights({"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)}))
    ['0.weight']
    """
    return {name: leaf for name, leaf in named(params).items() if leaf.ndim >= 2}


# --- one vector for a whole tree -------------------------------------------------------------------------------


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    kinds = {leaf.dtype for leaf in tensors}
    if len(kinds) == 1:
        return kinds.pop()
    joint = torch.float32
    for dtype in kinds:
        joint = torch.promote_types(joint, dtype)
    integers = {dtype for dtype in kinds if not dtype.is_floating_point and not dtype.is_complex}
    if integers & {torch.int64, torch.uint64}:
        raise TreeError("int64 next to other dtypes has no exact common vector: ravel it by itself")
    if integers & {torch.int32, torch.uint32}:
        joint = torch.promote_types(joint, torch.float64)
    return joint


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves of `tree` as one vector `(P,)`, and the function that undoes it.

    The vector has a dtype that holds every leaf exactly; `unravel` gives each leaf its own dtype and shape back
    and raises `TreeError` for a vector of another length. Both are differentiable.

    >>> vector, unravel = ravel({"w": torch.ones(2, 2), "b": torch.zeros(1, dtype=torch.float64)})
    >>> vector.shape, vector.dtype, unravel(vector)["w"].dtype
    (torch.Size([5]), torch.float64, torch.float32)
    """
    tensors, spec = flatten(tree)
    shapes = [(leaf.shape, leaf.dtype, leaf.numel()) for leaf in tensors]
    total = sum(size for _, _, size in shapes)
    dtype = _common_dtype(tensors) if tensors else torch.float32
    vector = torch.cat([leaf.reshape(-1).to(dtype) for leaf in tensors]) if tensors else torch.zeros(0)

    def unravel(vector: Tensor) -> Tree:
        if vector.shape != (total,):
            raise TreeError(f"the vector has shape {tuple(vector.shape)}, the tree has {total} elements: expected ({total},)")
        parts = vector.split([size for _, _, size in shapes]) if shapes else ()
        return unflatten(spec, [part.reshape(shape).to(kind) for part, (shape, kind, _) in zip(parts, shapes)])

    return vector, unravel


# --- many trees as one, one as many ----------------------------------------------------------------------------


def stack(trees: Iterable[Tree]) -> Tree:
    """Trees of the same structure as one, whose leaves have a new first dimension.

    >>> stack([{"x": torch.tensor(1)}, {"x": torch.tensor(2)}])
    {'x': tensor([1, 2])}
    """
    items = list(trees)
    if not items:
        raise ArgumentError("stack needs at least one tree")
    return map(lambda *members: torch.stack(members), items[0], *items[1:])


def unstack(tree: Tree) -> list[Tree]:
    """One tree for each place along the first dimension, with memory of its own: undoes `stack`.

    >>> unstack({"x": torch.tensor([1, 2])})
    [{'x': tensor(1)}, {'x': tensor(2)}]
    """
    tensors, spec = flatten(tree)
    size = batch_size(tree)
    columns = [leaf.unbind(0) for leaf in tensors]
    # Copies: views of a state that is donated later would change under their owner's hands.
    return [unflatten(spec, [column[place].clone() for column in columns]) for place in range(size)]


def concat(trees: Iterable[Tree]) -> Tree:
    """Trees of the same structure joined along the first dimension: undoes `divide`."""
    items = list(trees)
    if not items:
        raise ArgumentError("concat needs at least one tree")
    return items[0] if len(items) == 1 else map(lambda *members: torch.cat(members), items[0], *items[1:])


def batch_size(batch: Tree) -> int:
    """The size N that all leaves `(N, …)` of a batch share.

    Raises `TreeError` when the tree has no leaves, a leaf is a scalar, or leaves disagree.

    >>> batch_size({"x": torch.zeros(5, 3), "y": torch.zeros(5)})
    5
    """
    return common_size(leaves(batch), batch)


def common_size(tensors: list[Any], batch: Tree) -> int:
    """`batch_size`, for a batch whose leaves have been taken already."""
    if not tensors:
        raise TreeError("the batch has no leaves: expected tensors of shape (N, …)")
    sizes = [leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in tensors]
    first = sizes[0]
    if first is None or any(size != first for size in sizes):
        seen = ", ".join(
            f"{path or 'the batch'}: {tuple(getattr(leaf, 'shape', ()))}" for path, leaf in zip(paths(batch), tensors)
        )
        raise TreeError(f"the leaves of a batch must have the same first dimension N; got {seen}")
    return int(first)


def part_sizes(size: int, parts: int) -> list[int]:
    """The sizes of `parts` contiguous parts of `size` examples: they differ by at most one, larger ones first.

    Fewer examples than parts give one part an example.

    >>> part_sizes(10, 4), part_sizes(2, 8)
    ([3, 3, 2, 2], [1, 1])
    """
    if parts < 1:
        raise ArgumentError(f"parts must be at least 1, got {parts}")
    if size < 1:
        raise TreeError("the batch is empty (N = 0): a gradient needs at least one example")
    parts = min(parts, size)
    small, larger = divmod(size, parts)
    return [small + 1] * larger + [small] * (parts - larger)


def divide(batch: Tree, parts: int) -> list[Tree]:
    """The batch as contiguous parts, in order, whose sizes differ by at most one; together they are the batch.

    >>> [part["x"].tolist() for part in divide({"x": torch.arange(5)}, 2)]
    [[0, 1, 2], [3, 4]]
    """
    tensors, spec = flatten(batch)
    sizes = part_sizes(batch_size(batch), parts)
    columns = [leaf.split(sizes) for leaf in tensors]
    return [unflatten(spec, [column[place] for column in columns]) for place in range(len(sizes))]


# --- one fixed tree of merges ----------------------------------------------------------------------------------


def tree_reduce(merge: Callable[[Item, Item], Item], items: Iterable[Item]) -> Item:
    """Fold `items` up one fixed binary tree, of depth ⌈log₂ n⌉, whose shape depends on their number alone.

    Items are taken from an iterator one by one and merged as soon as two equal subtrees are complete, so at
    most ⌈log₂ n⌉ + 1 partial results are alive. Neighbours are merged, earlier ones on the left.

    >>> tree_reduce(lambda a, b: f"({a}{b})", "abcde")
    '(((ab)(cd))e)'
    """
    pending: list[tuple[int, Item]] = []
    for item in items:
        height = 0
        while pending and pending[-1][0] == height:
            item, height = merge(pending.pop()[1], item), height + 1
        pending.append((height, item))
    if not pending:
        raise ArgumentError("tree_reduce needs at least one item")
    result = pending.pop()[1]
    while pending:
        result = merge(pending.pop()[1], result)
    return result


def depth(items: int) -> int:
    """The depth ⌈log₂ n⌉ of the tree that `tree_reduce` folds n items up.

    >>> [depth(n) for n in (1, 2, 3, 8, 9)]
    [0, 1, 2, 3, 4]
    """
    return math.ceil(math.log2(items)) if items > 1 else 0
