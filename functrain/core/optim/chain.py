"""Several parts as one optimizer: what each passes on is the next one's gradient.

    u₀ = g,   uᵢ = partᵢ(uᵢ₋₁, p),   p ← p + uₙ

Source: optax's chain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functrain.core.errors import ArgumentError, TreeError
from functrain.core.optim.base import Optimizer, check_optimizers, check_params, check_state, share_of, updated, uses
from functrain.core.tree import Tree


class ChainState(NamedTuple):
    """The state of each part, by its place: "0", "1", …"""

    inner: dict[str, Any]


def chain(*parts: Any) -> Optimizer:
    """Parts one after the other, usually with an optimizer at the end: `chain(clip_by_norm(1.0), adamw(1e-3))`.

    A part is an optimizer, and any optimizer is a part. Each gets its own key of the chain's. Hyperparameters keep their names
    (`norm`, `lr`); those that two parts have are qualified by their places (`"0.eps"`, `"1.eps"`). Where the last part
    updates in place, so does the chain: the parts before it compute, and its kernel is given what they pass on.

    Raises `ArgumentError` for no parts, and for one that is no optimizer.

    >>> import torch
    >>> from functrain.core.optim import clip, sgd
    >>> optimizer = chain(clip(0.5), sgd(0.1))
    >>> params = torch.ones(2)
    >>> optimizer.update(torch.tensor([3.0, 0.1]), optimizer.init(params), params)[0]
    tensor([-0.0500, -0.0100])
    """
    if not parts:
        raise ArgumentError("chain needs at least one part: for instance chain(clip_by_norm(1.0), adamw(1e-3))")
    check_optimizers("chain", {f"part {place}": one for place, one in enumerate(parts)})

    def init(params: Tree) -> ChainState:
        check_params(params)
        return ChainState({str(place): one.init(params) for place, one in enumerate(parts)})

    def passed(ways: list[Any], grads: Tree, state: ChainState, params: Tree, extra: Any) -> tuple[Tree, ChainState]:
        check_state(state, ChainState)
        if len(state.inner) != len(parts):
            raise TreeError(f"expected the states of {len(parts)} parts, got {len(state.inner)}: made by another chain's init")
        states = {}
        for place, (one, way) in enumerate(zip(parts, ways)):
            its = share_of(extra, one, place)
            grads, states[str(place)] = updated(way, one, grads, state.inner[str(place)], params, its)
        return grads, ChainState(states)

    def update(grads: Tree, state: ChainState, params: Tree, **extra: Tensor) -> tuple[Tree, ChainState]:
        return passed([one.update for one in parts], grads, state, params, extra)

    def fused(grads: Tree, state: ChainState, params: Tree, **extra: Tensor) -> tuple[Tree, ChainState]:
        return passed([*(one.update for one in parts[:-1]), parts[-1].fused], grads, state, params, extra)

    used = frozenset().union(*map(uses, parts))
    faster = None if getattr(parts[-1], "fused", None) is None else fused
    return Optimizer(init, update, faster, "chain", {}, used, {str(place): one for place, one in enumerate(parts)})
