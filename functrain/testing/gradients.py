"""The laws of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.explain import explain
from functrain.core.grad import entry_of
from functrain.core.tree import Tree
from functrain.engine.parallel import parallel
from functrain.testing.comparing import alike, equal, same_bits, unchanged


def check_grad(
    grad: Any, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None, vmap: bool = True
) -> None:
    """Check that a gradient is a pure, unfinished sum that every plan computes alike.

    - it changes none of its arguments, gives the same bits again, and grads like params (or like the entry that it is of);
    - parts add up to the whole in every plan (of a loss that threads a shared carry: the unfused plans agree);
    - it nests: under `torch.func.grad` its `loss` has its `grads` as gradient, under vmap it is the loop.

    `vmap=False` leaves vmap out, for modules that have no rule for it (nn.LSTM).

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch @ params["w"]) ** 2
    >>> check_grad(ft.grad(loss), {"w": torch.ones(2)}, torch.arange(10.0).reshape(5, 2))
    """
    name = explain(grad).title

    def take(params: Tree) -> Any:
        return grad(params, batch, carry=carry, key=key)

    whole = unchanged(f"{name}: arguments are unchanged", lambda *_: take(params), params, batch, carry, key)
    same_bits(f"{name}: the same again", take(params), whole)
    alike(f"{name}: grads are like params", whole.grads, entry_of(grad, params).value)
    shared = carry is not None and not grad.lanes
    plans: list[Any] = ["loop", "threads"] + (["vmap"] if vmap else []) + ([] if shared else ["fused"])
    for parts in (2, 3, tree.batch_size(batch)):
        results = [parallel(grad, parts, how=how, workers=2)(params, batch, carry=carry, key=key) for how in plans]
        for how, result in zip(plans, results):
            equal(f"{name}: {parts} parts, {how}", result, results[0] if shared else whole)
    _check_nesting(grad, take, params, whole, vmap)


def _check_nesting(grad: Any, take: Callable[[Tree], Any], params: Tree, whole: Any, vmap: bool) -> None:
    name = explain(grad).title
    flat, spec = tree.flatten(params)
    outer = torch.func.grad(lambda leaves: take(tree.unflatten(spec, leaves)).loss)(tuple(flat))
    equal(f"{name}: under torch.func.grad", entry_of(grad, tree.unflatten(spec, outer)).value, whole.grads)
    if vmap:
        half = tree.map(lambda leaf: leaf / 2, params)
        both = torch.func.vmap(lambda *leaves: tuple(tree.leaves(take(tree.unflatten(spec, leaves)).grads)))
        stacked = tree.unflatten(tree.structure(whole.grads), both(*tree.leaves(tree.stack([params, half]))))
        for got, member in zip(tree.unstack(stacked), (params, half)):
            equal(f"{name}: vmap is the loop", got, take(member).grads)
