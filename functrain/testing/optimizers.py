"""The laws of optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrain.core import optim, random, tree
from functrain.core.optim import Optimizer
from functrain.core.tree import Tree
from functrain.testing.comparing import LawError, alike, copied, equal, same_bits, unchanged


def check_optimizer(optimizer: Optimizer, params: Tree = None, *, steps: int = 5) -> None:
    """Check that an optimizer is a pair of pure functions, and that its faster ways give the same numbers.

    - `update` changes no argument; updates are like params, and the state keeps its structure, shapes and dtypes;
    - `torch.func.vmap(update)` is the loop over members; `fused`, if there is one, is `params + updates`;
    - `with_hyper` sets each hyperparameter, and the same number again gives the same bits.

    >>> import functrain as ft
    >>> check_optimizer(ft.optim.adamw(1e-3))
    """
    name = optimizer.name
    if params is None:
        key = random.key(1)
        params = {"w": random.normal(key, (3, 2)), "b": (random.normal(random.fold_in(key, 1), (2,)), torch.tensor(0.5))}
    state = unchanged(f"{name}: init changes nothing", optimizer.init, params)
    members, place, fused = [], (params, state), (copied(params), copied(state))
    for count in range(steps):
        key = random.fold_in(random.key(2), count)
        grads = tree.map(lambda p, key=key: random.normal(random.fold_in(key, p.numel()), p.shape, p.dtype), params)
        members.append((grads, place[1], place[0]))
        updates, state = unchanged(f"{name}: update changes nothing", optimizer.update, *members[-1])
        alike(f"{name}: updates are like params", updates, params)
        alike(f"{name}: the state keeps its structure", state, members[-1][1])
        place = (optim.apply_updates(place[0], updates), state)
        if optimizer.fused is not None:
            fused = optimizer.fused(copied(grads), fused[1], fused[0])
            equal(f"{name}: fused is update and apply", fused, place)
    _check_vmapped(optimizer, members)
    if hasattr(state, "hyper"):
        _check_hyper(optimizer, *members[-1])


def _check_vmapped(optimizer: Optimizer, members: list[Any]) -> None:
    flat, spec = tree.flatten(tree.stack(members))
    shape = None

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal shape
        results, shape = tree.flatten(optimizer.update(*tree.unflatten(spec, leaves)))
        return tuple(results)

    outputs = torch.func.vmap(one)(*flat)
    assert shape is not None
    for member, got in zip(members, tree.unstack(tree.unflatten(shape, outputs))):
        equal(f"{optimizer.name}: vmap of update is the loop", got, optimizer.update(*member))


def _check_hyper(optimizer: Optimizer, grads: Tree, state: Any, params: Tree) -> None:
    for path, value in tree.named(optim.hyper(state), "_").items():
        same = optimizer.update(grads, optim.with_hyper(state, **{path: value}), params)
        same_bits(f"{optimizer.name}: with_hyper of the same number", same, optimizer.update(grads, state, params))
        other = optim.with_hyper(state, **{path: 0.125})
        found = tree.named(optim.hyper(other), "_")[path]
        if found.item() != 0.125 or tree.named(optim.hyper(state), "_")[path] is not value:
            raise LawError(f"{optimizer.name}: with_hyper({path}=0.125) gives a new state with it, found {found.item()}")
