"""Gradients over sub-batches, reduced up one fixed tree: `parallel` and `accumulate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import random, reduce, tree
from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage, explain
from functrain.core.grad import as_gradient, checked_size, summed
from functrain.core.loss import missing
from functrain.core.reduce import Gradient, Reducer
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree
from functrain.engine.plan import How, Plan, choose
from functrain.engine.workers import checked_workers, intra_op_threads, run_all


class Part(NamedTuple):
    """One part of a batch, with the randomness and the lanes of carry that belong to its examples."""

    batch: Tree
    keys: Tensor | None
    carry: Tree


def parallel(
    grad: Any,
    parts: int,
    reduce: Reducer = reduce.mean,
    *,
    how: How = "auto",
    workers: int | None = None,
    exact: bool = False,
) -> Parallel:
    """`grad` over `parts` sub-batches, reduced up one fixed binary tree: a gradient again.

    The batch is cut into contiguous parts whose sizes differ by at most one (fewer examples than parts: one
    each). Their gradients are merged by `reduce` up a tree of depth ⌈log₂ parts⌉ and finished once.

    - `how`: `fused` (one backward pass over the whole batch; linear reducers only), `vmap`, `threads`, `loop`, or
      `auto`, which decides by algebra; `ft.explain` says what and why.
    - `workers`: threads for the plan `threads`; default: the processors that there are. They live for the time of a call.
      Inside a torch.func transform or a compiler, threads would lose the transform, so their parts are looped.
    - `exact`: the same bits for every number of workers: parts are not fused, and each runs on one intra-op thread.

    A loss's `key` is cut with the batch: an example's randomness does not depend on the part it is in. A carry is
    shared by all parts and averaged (weighted by examples; integers: the largest), or, for gradients whose carry
    has a lane for each example (`tbptt`), cut and joined with the batch.

    Raises `ArgumentError` for fewer than one part or worker, or a plan that cannot give the result.

    >>> import functrain as ft
    >>> g = ft.grad(lambda params, batch: (batch @ params["w"]) ** 2)
    >>> params, batch = {"w": torch.ones(2)}, torch.ones(5, 2)
    >>> both = [ft.parallel(g, 2, how=how)(params, batch).grads["w"] for how in ("fused", "loop")]
    >>> both
    [tensor([20., 20.]), tensor([20., 20.])]
    """
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ArgumentError(f"parts must be an int of at least 1, got {parts!r}")
    if not isinstance(reduce, Reducer):
        raise ArgumentError(f"reduce must be a Reducer such as ft.reduce.mean, got {reduce!r}")
    return Parallel(as_gradient(grad), parts, reduce, how, checked_workers(workers), exact)


def accumulate(grad: Any, parts: int) -> Parallel:
    """`grad` over `parts` micro-batches one after the other: the memory of one, the result of the whole batch.

    The same as `parallel(grad, parts, how="loop")` with the gradient's own reducer.
    """
    return parallel(grad, parts, as_gradient(grad).reduce, how="loop")


class Parallel:
    """What `parallel` returns; called like any gradient: `(params, batch, *, carry=None, key=None)`."""

    def __init__(self, grad: Any, parts: int, reduce: Reducer, how: How, workers: int, exact: bool) -> None:
        self.grad, self.parts, self.reduce = grad, parts, reduce
        self.workers, self.exact = min(workers, parts), exact
        self.uses, self.lanes = grad.uses, grad.lanes
        self.plan: Plan = choose(grad, how, parts, self.workers, reduce.linear, exact)

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Any:
        if self.plan.how == "fused":
            return self.reduce.lift(self.grad(params, batch, carry=carry, key=key))
        missing(self.uses, carry, key)
        parts = self._cut(batch, carry, key)
        taken = self._taken(params, parts)
        sizes = [tree.batch_size(part.batch) for part in parts]
        carries: list[Tree] = []

        def lifted() -> Iterator[Any]:
            for gradient in taken:
                carries.append(gradient.carry)
                yield self.reduce.lift(gradient._replace(carry=None))

        merged = tree.tree_reduce(self.reduce.merge, lifted())
        if "carry" not in self.uses:
            return merged
        joined = self._joined(carries, sizes)
        return merged._replace(carry=joined) if isinstance(merged, Gradient) else _WithCarry(merged, joined)

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        """The reduced gradient, finished: what the optimizer gets."""
        if self.plan.how == "fused" and self.reduce is reduce.mean and self.grad.reduce is reduce.mean:
            return self.grad.finished(params, batch, carry=carry, key=key)
        merged = self(params, batch, carry=carry, key=key)
        if isinstance(merged, _WithCarry):
            return self.reduce.finish(merged.merged)._replace(carry=merged.carry)
        return self.reduce.finish(merged)

    def explain(self) -> Stage:
        """The plan, and why it was taken."""
        facts = {
            "plan": f"{self.plan.how} ({self.plan.reason})",
            "reduce": f"{self.reduce.name}, up a tree of depth {tree.depth(self.parts)}",
            "backward passes": "1" if self.plan.how == "fused" else f"{self.parts}, one for each part",
            "randomness": "cut with the batch" if "key" in self.uses else "none",
        }
        if self.plan.how == "threads":
            inside = "looped inside a transform or compiler"
            facts["workers"] = f"{self.workers}, {self._intra_op()} intra-op threads each; {inside}"
        facts["exact"] = "yes: the bits do not depend on workers" if self.exact else "no: equal up to rounding"
        return Stage(f"parallel, {self.parts} parts", facts, [explain(self.grad)])

    # --- the way of a batch: cut, taken, joined ---

    def _cut(self, batch: Tree, carry: Tree, key: Tensor | None) -> list[Part]:
        size = checked_size(batch)
        keys = random.example_keys(key, size) if key is not None and "key" in self.uses else None
        batches = tree.divide(batch, self.parts)
        lanes = tree.divide(carry, self.parts) if self.lanes and carry is not None else [carry] * len(batches)
        streams = tree.divide(keys, self.parts) if keys is not None else [None] * len(batches)
        return [Part(*row) for row in zip(batches, streams, lanes)]

    def _taken(self, params: Tree, parts: list[Part]) -> Iterator[Gradient] | list[Gradient]:
        def one(part: Part) -> Gradient:
            return summed(self.grad, params, part.batch, carry=part.carry, key=part.keys)

        if self.plan.how == "vmap":
            return self._by_vmap(params, parts)
        surrounded = inside_transform() or inside_tracing()
        if self.plan.how == "threads" and self.workers > 1 and not surrounded:
            return run_all(one, parts, self.workers, self._intra_op())
        if self.exact and not surrounded:
            with intra_op_threads(1):
                return [one(part) for part in parts]
        return (one(part) for part in parts)

    def _intra_op(self) -> int:
        # Never more threads in all than there were: threads times intra-op threads would oversubscribe.
        return 1 if self.exact else max(1, torch.get_num_threads() // self.workers)

    def _by_vmap(self, params: Tree, parts: list[Part]) -> list[Gradient]:
        taken: list[Gradient] = []
        # Sizes differ by at most one, larger parts first: at most two stacks of equal parts.
        for size in dict.fromkeys(tree.batch_size(part.batch) for part in parts):
            members = [part for part in parts if tree.batch_size(part.batch) == size]
            taken += self._stacked(params, members)
        return taken

    def _stacked(self, params: Tree, parts: list[Part]) -> list[Gradient]:
        # A shared carry is stacked too: vmap refuses to write batched statistics into buffers that are not.
        flat, spec = tree.flatten(tree.stack(parts))
        result = None

        def one(*leaves: Tensor) -> tuple[Tensor, ...]:
            nonlocal result
            part = tree.unflatten(spec, leaves)
            gradient = summed(self.grad, params, part.batch, carry=part.carry, key=part.keys)
            outputs, result = tree.flatten(gradient)
            return tuple(outputs)

        outputs = torch.func.vmap(one)(*flat)
        assert result is not None
        return [tree.unflatten(result, row) for row in zip(*(output.unbind(0) for output in outputs))]

    def _joined(self, carries: list[Tree], sizes: list[int]) -> Tree:
        if self.lanes:
            return tree.concat(carries)
        count = sum(sizes)
        shares = iter(tree.map(lambda leaf, share=size / count: _share(leaf, share), c) for c, size in zip(carries, sizes))
        return tree.tree_reduce(lambda a, b: tree.map(_merged, a, b), shares)


class _WithCarry(NamedTuple):
    merged: Any
    carry: Tree


def _share(leaf: Tensor, share: float) -> Tensor:
    return leaf * share if leaf.is_floating_point() else leaf


def _merged(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.is_floating_point() else torch.maximum(a, b)
