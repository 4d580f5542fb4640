"""The laws of reducers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.errors import ArgumentError
from functrain.core.explain import explain
from functrain.core.grad import grad as gradient_of
from functrain.core.loss import Losses
from functrain.core.reduce.base import Gradient, Reducer
from functrain.core.tree import Tree
from functrain.engine.parallel import parallel
from functrain.testing.comparing import LawError, alike, equal, same_bits, unchanged

# As many parts as reducers need that tell two corrupt ones from the others (Krum: 2f + 3).
_PARTS = 7


def _line(params: Tree, batch: Tree) -> Losses:
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return Losses(error**2, batch["weight"], aux={"error": error.abs()})


def _line_problem(size: int = 2 * _PARTS) -> tuple[Tree, Tree]:
    key = random.key(0)
    x, y = (random.normal(random.fold_in(key, n), shape, torch.float64) for n, shape in enumerate([(size, 3), (size,)]))
    params = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), "b": torch.tensor(0.1, dtype=torch.float64)}
    return params, {"x": x, "y": y, "weight": random.uniform(random.fold_in(key, 2), (size,), torch.float64) + 0.5}


def check_reducer(reducer: Reducer, examples: Sequence[Gradient] | None = None) -> None:
    """Check that a reducer is a monoid over gradients, and what it says of itself.

    - `merge` is associative, up to rounding, and `lift`, `merge` and `finish` change none of their arguments;
    - `finish` gives a `Gradient` whose grads are like params (structure, shapes, dtypes), with a 0-d loss, a 0-d weight above
      zero, and the measures in `aux`, and the same bits again (for the same key);
    - the plans loop, threads and vmap agree;
    - a `linear` reducer merges by adding, whatever the size of the numbers, and over parts gives what one gradient over the
      batch gives;
    - one with `scale` gives, over any number of parts, what its examples give that are lifted one by one.

    `examples`: at least three unfinished gradients of the same params; default: seven, of a weighted linear regression.

    >>> import functrain as ft
    >>> check_reducer(ft.reduce.mean)
    """
    if not isinstance(reducer, Reducer):
        raise ArgumentError(f"check_reducer takes a Reducer(name, merge, finish), got {explain(reducer).title}")
    name = repr(reducer)
    params, batch = _line_problem()
    taken = gradient_of(_line)
    if examples is None:
        examples = [taken(params, part) for part in tree.divide(batch, _PARTS)]
    lifted = [unchanged(f"{name}: lift changes nothing", reducer.lift, g._replace(carry=None)) for g in examples]
    total = _check_merging(name, reducer, lifted)
    key = random.key(3)
    result = unchanged(f"{name}: finish changes nothing", lambda total: reducer.finished(total, key), total)
    _check_result(name, result, examples[0])
    same_bits(f"{name}: the same again", reducer.finished(total, key), result)
    _check_plans(name, reducer, params, batch, key)
    if reducer.linear:
        for size in (0.0, 1.0, 1e6):
            other = tree.map(lambda leaf, size=size: leaf * size, lifted[1])
            added = tree.map(torch.add, lifted[0], other)
            equal(f"{name}: linear, so merging adds (sums {size:g} times as large)", reducer.merge(lifted[0], other), added)
        _check_whole(f"{name}: linear, so", reducer, params, batch, reducer.lift(taken(params, batch)), key)
    if reducer.scale is not None:
        ones = [reducer.lift(taken(params, one)) for one in tree.divide(batch, len(batch["y"]))]
        _check_whole(f"{name}: of examples, so", reducer, params, batch, tree.tree_reduce(reducer.merge, ones), key)


def _check_result(name: str, result: Any, example: Gradient) -> None:
    if not isinstance(result, Gradient):
        raise LawError(f"{name}: finish gives a Gradient whose grads are like params, got {explain(result).title}")
    alike(f"{name}: finish gives a Gradient whose grads are like params", result.grads, example.grads)
    for field, value in (("loss", result.loss), ("weight", result.weight)):
        if not isinstance(value, Tensor) or value.ndim:
            raise LawError(f"{name}: finish gives a 0-d {field}, got {value!r}")
    if not result.weight > 0:
        raise LawError(f"{name}: finish keeps the weight of what it took the mean of, got {result.weight!r}")
    missing = set(tree.named(example.aux)) - {path.removeprefix("aux.") for path in tree.named(result.aux)}
    if missing:
        raise LawError(f"{name}: finish keeps the measures in aux, missing {', '.join(sorted(missing))}")


def _check_merging(name: str, reducer: Reducer, lifted: list[Any]) -> Any:
    def merge(a: Any, b: Any) -> Any:
        return unchanged(f"{name}: merge changes nothing", reducer.merge, a, b)

    for a, b, c in zip(lifted, lifted[1:], lifted[2:]):
        equal(f"{name}: merge is associative", merge(merge(a, b), c), merge(a, merge(b, c)))
    return tree.tree_reduce(merge, lifted)


def _check_plans(name: str, reducer: Reducer, params: Tree, batch: Tree, key: Tensor) -> None:
    results = {
        how: parallel(gradient_of(_line), _PARTS, reducer, how=how, workers=2).finished(params, batch, key=key)
        for how in ("loop", "threads", "vmap")
    }
    for how in ("threads", "vmap"):
        equal(f"{name}: the plan {how} is the loop", results[how], results["loop"])


def _check_whole(law: str, reducer: Reducer, params: Tree, batch: Tree, total: Any, key: Tensor) -> None:
    whole = reducer.finished(total, key)
    for parts in (1, 2, 3, len(batch["y"]), 50):
        cut = parallel(gradient_of(_line), parts, reducer, how="loop").finished(params, batch, key=key)
        equal(f"{law} {parts} parts are the whole", cut, whole)
