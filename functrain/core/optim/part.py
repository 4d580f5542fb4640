"""Parts of optimizers that remember nothing but their hyperparameters: the scaffolding around their rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.optim.base import Optimizer, Settings, check_state, leaves_of, started
from functrain.core.optim.hyper import place, resolve
from functrain.core.tree import Tree


class PartState(NamedTuple):
    """The number of updates taken, the hyperparameters."""

    steps: Tensor
    hyper: dict[str, Any]


Rule = Callable[..., list[Tensor]]
"""`rule(grads, params, now) -> updates`, lists of leaves: what passes on of what comes in, for the numbers of now.

`now` are the hyperparameters, and `steps`, the updates taken before this one. A rule that `uses` more is given it by keyword.
"""


def part(
    name: str,
    settings: Settings,
    rule: Rule,
    *,
    uses: frozenset[str] = frozenset(),
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """A part of one pure rule over all leaves; `options` is what else was asked for, to be told by `explain`."""

    def init(params: Tree) -> PartState:
        return PartState(started(params), place(settings, params))

    def update(grads: Tree, state: PartState, params: Tree, **extra: Tensor) -> tuple[Tree, PartState]:
        check_state(state, PartState)
        flat, spec = tree.flatten(params)
        now = resolve(settings, state.hyper, state.steps) | {"steps": state.steps}
        passed = rule(leaves_of(grads, params, spec, flat), flat, now, **extra)
        return tree.unflatten(spec, passed), PartState(state.steps + 1, state.hyper)

    return Optimizer(init, update, None, name, {**settings, **(options or {})}, uses, part=True)


def wide(leaf: Tensor) -> Tensor:
    """The leaf in float32, or what it is beyond that: half precision is computed there.

    So are its products with 0-d numbers of that width, which torch.func.vmap would otherwise round to half precision first.
    """
    return leaf.to(width(leaf))


def width(leaf: Tensor) -> torch.dtype:
    """The dtype of `wide(leaf)`."""
    return torch.promote_types(leaf.dtype, torch.float32)
