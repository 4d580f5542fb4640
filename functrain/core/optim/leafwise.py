"""Optimizers whose rule is the same for every leaf: the scaffolding around that rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import NonFiniteError
from functrain.core.layout import Layout, Memo
from functrain.core.optim.arithmetic import Arithmetic, InPlace, Leaf, Number, Pure
from functrain.core.optim.base import Optimizer, Settings, check_params, check_state, leaves_of
from functrain.core.optim.hyper import number_dtype, place, resolve
from functrain.core.transforms import computed_once
from functrain.core.tree import Tree

Numbers = dict[str, Number]
NumbersRule = Callable[[Numbers, Number, Numbers], tuple[Numbers, Numbers]]
"""`numbers(now, count, scalars) -> (numbers, scalars)`: what the rule needs besides leaves, and the new running scalars."""
Rule = Callable[..., tuple[Leaf, ...]]
"""`rule(do, param, grad, *buffers, numbers) -> new buffers`: moves the parameter by `do.descend` and its like."""
Kernel = Callable[[list[Tensor], list[Tensor], list[list[Tensor]], dict[str, float], Tensor], None]
"""`kernel(params, grads, buffers, now, count)`: one of torch's fused kernels, in place."""


def leafwise(
    name: str,
    kind: type[Any],
    settings: Settings,
    numbers: NumbersRule,
    rule: Rule,
    *,
    buffers: Mapping[str, Callable[[Tensor], Tensor]],
    scalars: Mapping[str, float] | None = None,
    kernel: Kernel | None = None,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """An optimizer of one rule for every leaf.

    - `kind`: the state, a NamedTuple of `steps`, the running `scalars` (0-d float64), the `buffers` (trees like params, each
      leaf made by its function of the parameter) and `hyper`, in this order;
    - `numbers`: computed once an update, in float64: of 0-d tensors, or of floats (see `root`, `choose`, `larger`);
      `count` is the number of this update, 1 for the first;
    - `rule`: written once, run leaf by leaf by `Pure`, and over all leaves at once by `InPlace`;
    - `kernel`: does what the rule does, in place;
    - `options`: what else was asked for, to be told by `explain`.

    A field of `kind` that is none of these is None. Buffers of params in half precision are float32, as is the arithmetic.
    """
    scalars = dict(scalars or {})
    memo = Memo()

    def made(**fields: Any) -> Any:
        return kind(**{**dict.fromkeys(kind._fields), **fields})

    def init(params: Tree) -> Any:
        check_params(params)
        device = next((leaf.device for leaf in tree.leaves(params)), None)
        count = torch.zeros((), dtype=torch.int64, device=device)
        running = place(dict(scalars), params)
        trees = {name: tree.map(lambda param, make=make: make(_wide(param)), params) for name, make in buffers.items()}
        return made(steps=count, **running, **trees, hyper=place(settings, params))

    def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        check_state(state, kind)
        flat, spec = tree.flatten(params)
        columns = [tree.leaves_like(spec, getattr(state, name), params) for name in buffers]
        count = state.steps + 1
        now = resolve(settings, state.hyper, state.steps)
        # The root of a whole number, or its quotient by one, would be of torch's default dtype.
        number = count.to(number_dtype(count.device))
        exact, running = numbers(now, number, {name: getattr(state, name) for name in scalars})
        cast: dict[torch.dtype, Numbers] = {}
        updates, rows = [], []
        for param, grad, *old in zip(flat, leaves_of(grads, params, spec, flat), *columns):
            # Cast once an update, so that compiled kernels stay in the leaf's width.
            real = torch.float64 if param.dtype == torch.float64 else torch.float32
            if real not in cast:
                cast[real] = _cast(exact, real)
            do = Pure(wide := _wide(param))
            new = rule(do, wide, grad.to(real), *old, cast[real])
            # 0-d leaves of half precision would be widened by the 0-d numbers.
            updates.append(torch.zeros_like(param) if do.update is None else do.update.to(param.dtype))
            rows.append([leaf.to(before.dtype) for leaf, before in zip(new, old)])
        trees = {name: tree.unflatten(spec, [row[place] for row in rows]) for place, name in enumerate(buffers)}
        return tree.unflatten(spec, updates), made(steps=count, **running, **trees, hyper=state.hyper)

    def fused(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        check_state(state, kind)
        flat, layout = memo.flatten(params)
        g = _leaves(layout, grads, flat) or leaves_of(grads, params, layout.spec, flat)
        columns = [
            _leaves(layout, column, flat) or tree.leaves_like(layout.spec, column, params)
            for column in (getattr(state, name) for name in buffers)
        ]
        work, g = [_wide(param) for param in flat], [_wide(grad) for grad in g]
        now = read(resolve(settings, state.hyper, state.steps), state.steps)
        running = {name: getattr(state, name) for name in scalars}
        if kernel is not None and len({param.dtype for param in work}) < 2:
            work, g, *columns = _alike(work, g, *columns)
            kernel(work, g, columns, now, state.steps + 1)
        elif flat:
            given, running = numbers(now, state.steps.item() + 1, {name: value.item() for name, value in running.items()})
            do: Arithmetic = InPlace(work)
            columns = [list(column) for column in rule(do, work, g, *columns, given)]
            running = {name: getattr(state, name).new_tensor(value) for name, value in running.items()}
        trees = {name: layout.built(column) for name, column in zip(buffers, columns)}
        flat = [new if new.dtype == old.dtype else old.copy_(new) for new, old in zip(work, flat)]
        return layout.built(flat), made(steps=state.steps + 1, **running, **trees, hyper=state.hyper)

    return Optimizer(init, update, fused, name, {**settings, **(options or {})})


def _wide(leaf: Tensor) -> Tensor:
    # In half precision a second moment stands still at 0.25 of its way, or is 0; and 1e-8 is 0.
    return leaf if leaf.dtype in (torch.float32, torch.float64) else leaf.to(torch.float32)


def _leaves(layout: Layout, value: Tree, like: list[Tensor]) -> list[Tensor] | None:
    """The leaves, in short, where they are shaped like those of the params."""
    leaves = layout.leaves(value)
    alike = leaves is not None and all(
        isinstance(leaf, Tensor) and leaf.shape == param.shape for leaf, param in zip(leaves, like)
    )
    return leaves if alike else None


def _cast(numbers: Numbers, dtype: torch.dtype) -> Numbers:
    tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    if not tensors:
        return numbers
    # As one vector, computed once: a compiler would compute them again, powers and all, for every few elements of every
    # leaf (over a quarter of a small step's time, on one thread).
    vector = computed_once(torch.stack([value.to(dtype) for value in tensors.values()]))
    return {**numbers, **dict(zip(tensors, vector.unbind()))}


def read(now: dict[str, Tensor], steps: Tensor) -> dict[str, float]:
    """Hyperparameters as floats; `NonFiniteError` for one that is not finite."""
    values = [value.item() for value in now.values()]
    if not all(map(math.isfinite, values)):
        wrong = ", ".join(f"{name} is {value}" for name, value in zip(now, values) if not math.isfinite(value))
        raise NonFiniteError(f"{wrong} after {int(steps)} updates: see its schedule, or what ft.with_hyper put in its place")
    return dict(zip(now, values))


def _alike(*columns: list[Tensor]) -> list[list[Tensor]]:
    # The fused kernels walk memory, not indices: where strides differ (a gradient is often transposed, or expanded
    # from one number) they would mix elements up, or read past the end.
    rows = [_row_alike(*row) for row in zip(*columns)]
    return [list(column) for column in zip(*rows)] if rows else [[] for _ in columns]


def _row_alike(*leaves: Tensor) -> tuple[Tensor, ...]:
    first = leaves[0].stride()
    return leaves if all(leaf.stride() == first for leaf in leaves) else tuple(leaf.contiguous() for leaf in leaves)
