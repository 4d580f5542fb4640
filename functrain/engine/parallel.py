"""Gradients over sub-batches, reduced up one fixed tree: `parallel` and `accumulate`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import random, reduce, tree
from functrain.core.deferred import Deferred
from functrain.core.errors import ArgumentError
from functrain.core.examples import check_lanes, checked_budget, scaled_sum
from functrain.core.explain import Stage, explain
from functrain.core.grad import as_gradient, check_mode, checked_size, summed
from functrain.core.heap import settled
from functrain.core.loss import missing
from functrain.core.reduce.base import Gradient, Reducer
from functrain.core.remat import after
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree
from functrain.engine.memory import fewer, like_its_own, out_of_memory
from functrain.engine.plan import How, Plan, choose, costs
from functrain.engine.workers import checked_workers, intra_op_threads, run_in_order


class Part(NamedTuple):
    """One part of a batch, drawn when it is needed, with the randomness and the lanes of carry that belong to its examples."""

    draw: Callable[[], Tree]
    keys: Tensor | None
    carry: Tree
    size: int
    place: str


def parallel(
    grad: Any,
    parts: int,
    reduce: Reducer = reduce.mean,
    *,
    how: How = "auto",
    workers: int | None = None,
    exact: bool = False,
    budget: int | None = None,
) -> Parallel:
    """`grad` over `parts` sub-batches, reduced up one fixed binary tree: a gradient again.

    The batch is cut into contiguous parts whose sizes differ by at most one (fewer examples than parts: one
    each). Their gradients are merged by `reduce` up a tree of depth ⌈log₂ parts⌉ and finished once.

    - `how`: `fused` (one backward pass over the whole batch; linear reducers only), `vmap`, `threads`, `loop`, or
      `auto`, which decides by algebra; `ft.explain` says what and why, and at which cost.
    - `workers`: threads for the plan `threads`; default: the processors that there are. They live for the time of a call.
      Inside a torch.func transform or a compiler, threads would lose the transform, so their parts are looped.
    - `exact`: the same bits for every number of workers: parts are not fused, and each runs on one intra-op thread.
    - `budget`: bytes that gradients of single examples may take at once, for reducers that need them
      (`clip_per_example`, `private`); default: a fixed 256 MiB.

    A loss's `key` is cut with the batch: an example's randomness does not depend on the part it is in. A carry is
    shared by all parts and averaged (weighted by examples; integers: the largest), or, for gradients whose carry
    has a lane for each example (`tbptt`), cut and joined with the batch. A `Deferred` batch is drawn part by part, by the
    worker that takes the part's gradient.

    Out of memory, half as many parts are alive at once from then on, and a warning says so: fewer workers have the same bits,
    and the plans `vmap` and `fused`, in groups, the same result up to rounding.

    Raises `ArgumentError` for fewer than one part, worker or byte, or a plan that cannot give the result. An error in a part
    stops the others and has a note that names the part.

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
        called = f": call it, ft.reduce.{reduce.__name__}(…)" if inspect.isfunction(reduce) else ""
        raise ArgumentError(f"reduce must be a Reducer such as ft.reduce.mean, got {explain(reduce).title}{called}")
    if parts < reduce.least:
        raise ArgumentError(f"{reduce.name} needs at least {reduce.least} parts to tell anything, got parts={parts}")
    checked_budget(budget)
    if not isinstance(exact, bool):
        raise ArgumentError(f"exact must be True or False, got {exact!r}")
    if reduce.scale is not None:
        check_lanes(as_gradient(grad))
    return Parallel(as_gradient(grad), parts, reduce, how, checked_workers(workers), exact, budget)


def accumulate(grad: Any, parts: int) -> Parallel:
    """`grad` over `parts` micro-batches one after the other: the memory of one, the result of the whole batch.

    The same as `parallel(grad, parts, how="loop")` with the gradient's own reducer.
    """
    return parallel(grad, parts, as_gradient(grad).reduce, how="loop")


class Parallel:
    """What `parallel` returns; called like any gradient: `(params, batch, *, carry=None, key=None)`."""

    def __init__(
        self, grad: Any, parts: int, reduce: Reducer, how: How, workers: int, exact: bool, budget: int | None
    ) -> None:
        self.grad, self.parts, self.reduce, self.how = grad, parts, reduce, how
        self.workers, self.exact, self.budget = min(workers, parts), exact, budget
        self.uses = grad.uses | {"key"} if reduce.keyed else grad.uses
        self.lanes = grad.lanes
        self.plan: Plan = choose(grad, how, parts, self.workers, reduce, exact)
        settled()
        self._alive = {"threads": self.workers, "loop": 1}.get(self.plan.how, parts)

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Any:
        missing(self.uses, carry, key)
        while True:
            try:
                return self._merged(params, batch, carry, key)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._alive = fewer(self._alive, self.plan.how, error)

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        """The reduced gradient, finished: what the optimizer gets."""
        whole = self.plan.how == "fused" and self._alive == self.parts
        if whole and self.reduce is reduce.mean and self.grad.reduce is reduce.mean:
            try:
                return self.grad.finished(params, batch, carry=carry, key=key)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._alive = fewer(self._alive, self.plan.how, error)
        merged = self(params, batch, carry=carry, key=key)
        if isinstance(merged, _WithCarry):
            return self.reduce.finished(merged.merged, key)._replace(carry=merged.carry)
        return self.reduce.finished(merged, key)

    def explain(self) -> Stage:
        """The plan, why it was taken, and what it costs."""
        facts = {
            "plan": f"{self.plan.how} ({self.plan.reason})",
            "reduce": f"{self.reduce.name}, up a tree of depth {tree.depth(self.parts)}",
            **costs(self.plan, self.parts, self.workers, self.reduce, self.exact),
            "randomness": self._randomness(),
        }
        if self.plan.how == "threads":
            inside = "looped inside a transform or compiler"
            facts["workers"] = f"{self.workers}, {self._intra_op()} intra-op threads each; {inside}"
        return Stage(f"parallel, {self.parts} part{'s' * (self.parts > 1)}", facts, [explain(self.grad)])

    def _randomness(self) -> str:
        drawn = ["the loss's, cut with the batch"] * ("key" in self.grad.uses) + ["the reducer's, once"] * self.reduce.keyed
        return " and ".join(drawn) or "none"

    # --- the way of a batch: cut, taken, joined ---

    def _merged(self, params: Tree, batch: Tree, carry: Tree, key: Tensor | None) -> Any:
        check_mode()
        fused = self.plan.how == "fused"
        # Fused, as many parts as may be alive are one.
        parts = self._cut(batch, carry, key, math.ceil(self.parts / self._alive) if fused else self.parts)
        carries: list[Tree] = []
        latest: list[Any] = []

        def lifted() -> Iterator[Any]:
            with closing(self._taken(params, parts, latest)) as taken:
                for gradient in taken:
                    carries.append(gradient.carry)
                    bare = gradient._replace(carry=None)
                    # Examples' gradients were scaled and added where they were taken: a part's sum is lifted already.
                    latest[:] = [bare if self.reduce.scale else self.reduce.lift(bare)]
                    yield latest[0]

        def merge(left: Any, right: Any) -> Any:
            latest[:] = [self.reduce.merge(left, right)]
            return latest[0]

        merged = tree.tree_reduce(merge, lifted())
        if "carry" not in self.uses:
            return merged
        joined = self._joined(carries, [part.size for part in parts])
        return merged._replace(carry=joined) if isinstance(merged, Gradient) else _WithCarry(merged, joined)

    def _cut(self, batch: Tree, carry: Tree, key: Tensor | None, parts: int) -> list[Part]:
        size = batch.size if isinstance(batch, Deferred) else checked_size(batch)
        keys = random.example_keys(key, size) if key is not None and "key" in self.grad.uses else None
        sizes = tree.part_sizes(size, parts)
        draws: Sequence[Callable[[], Tree]]
        if isinstance(batch, Deferred):
            draws = batch.parts(parts)
        else:
            draws = [partial(_given, part) for part in (tree.divide(batch, parts) if len(sizes) > 1 else [batch])]
        lanes = tree.divide(carry, parts) if self.lanes and carry is not None else [carry] * len(sizes)
        streams = keys.split(sizes) if keys is not None else [None] * len(sizes)
        places = [f"part {place + 1} of {len(sizes)}" for place in range(len(sizes))]
        return [Part(*row) for row in zip(draws, streams, lanes, sizes, places)]

    def _one(self, params: Tree, part: Part) -> Gradient:
        try:
            batch = part.draw()
            if self.exact and not inside_transform() and not inside_tracing():
                # The same bits, whether the part was cut from a batch or drawn by itself.
                batch = tree.map(like_its_own, batch)
            return self._sum(params, batch, part.carry, part.keys)
        except Exception as error:
            error.add_note(f"in {part.place} ({part.size} example{'s' * (part.size > 1)}) of a batch")
            raise

    def _sum(self, params: Tree, batch: Tree, carry: Tree, keys: Tensor | None) -> Gradient:
        if self.reduce.scale is None:
            return summed(self.grad, params, batch, carry=carry, key=keys)
        scale = self.reduce.scale
        return scaled_sum(self.grad, params, batch, scale=scale, carry=carry, key=keys, budget=self.budget)

    def _taken(self, params: Tree, parts: list[Part], latest: list[Any]) -> Generator[Gradient]:
        # A thread loses what surrounds the caller: transforms, traces, and modes (torch.device(…) as a context).
        surrounded = inside_transform() or inside_tracing() or torch._C._len_torch_function_stack() > 0
        if self.plan.how == "vmap":
            yield from self._by_vmap(params, parts)
        elif self.plan.how == "threads" and self._alive > 1 and not surrounded:
            yield from run_in_order(partial(self._one, params), parts, self._alive, self._intra_op())
        else:
            one_by_one = self.plan.how == "loop" and inside_tracing()
            for part in parts:
                if one_by_one and latest:
                    part = part._replace(draw=partial(_drawn_after, tree.leaves(latest), part.draw))
                with intra_op_threads(1) if self.exact and not surrounded else nullcontext():
                    gradient = self._one(params, part)
                yield gradient

    def _intra_op(self) -> int:
        # Never more threads in all than there were: threads times intra-op threads would oversubscribe.
        return 1 if self.exact else max(1, torch.get_num_threads() // self.workers)

    def _by_vmap(self, params: Tree, parts: list[Part]) -> Iterator[Gradient]:
        # Sizes differ by at most one, larger parts first: at most two kinds of stacks of equal parts.
        for size in dict.fromkeys(part.size for part in parts):
            members = [part for part in parts if part.size == size]
            for start in range(0, len(members), self._alive):
                yield from self._stacked(params, members[start : start + self._alive])

    def _stacked(self, params: Tree, parts: list[Part]) -> list[Gradient]:
        # A shared carry is stacked too: vmap refuses to write batched statistics into buffers that are not.
        flat, spec = tree.flatten(tree.stack([(part.draw(), part.carry, part.keys) for part in parts]))
        result = None

        def one(*leaves: Tensor) -> tuple[Tensor, ...]:
            nonlocal result
            outputs, result = tree.flatten(self._sum(params, *tree.unflatten(spec, leaves)))
            return tuple(outputs)

        outputs = torch.func.vmap(one)(*flat)
        assert result is not None
        return [tree.unflatten(result, row) for row in zip(*(output.unbind(0) for output in outputs))]

    def _joined(self, carries: list[Tree], sizes: list[int]) -> Tree:
        if len(sizes) == 1:
            return carries[0]
        if self.lanes:
            return tree.concat(carries)
        count = sum(sizes)
        shares = iter(tree.map(lambda leaf, share=size / count: _share(leaf, share), c) for c, size in zip(carries, sizes))
        return tree.tree_reduce(lambda a, b: tree.map(_merged, a, b), shares)


class _WithCarry(NamedTuple):
    merged: Any
    carry: Tree


def _given(batch: Tree) -> Tree:
    return batch


def _drawn_after(waited_for: list[Tensor], draw: Callable[[], Tree]) -> Tree:
    # A compiler would take the parts side by side, in the memory of all.
    leaves, spec = tree.flatten(draw())
    return tree.unflatten(spec, after(waited_for, leaves))


def _share(leaf: Tensor, share: float) -> Tensor:
    return leaf * share if leaf.is_floating_point() else leaf


def _merged(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.is_floating_point() else torch.maximum(a, b)
