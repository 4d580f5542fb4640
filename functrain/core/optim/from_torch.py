"""Any optimizer class of torch's kind as a pair of pure functions.

An update makes a fresh torch optimizer of the present hyperparameters, hands it what the state holds, has it take one
step, and takes what it then keeps back into the state: the numbers are those of the torch optimizer itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.optim.base import Optimizer, check_params, check_state, leaves_of, started
from functrain.core.optim.hyper import place, resolve
from functrain.core.optim.leafwise import read
from functrain.core.optim.torch_step import Kept, TorchStep
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree


class TorchState(NamedTuple):
    """The number of updates taken, what is kept of each parameter (a dict for each), of all, the hyperparameters."""

    steps: Tensor
    kept: Tree
    group: dict[str, Any]
    hyper: dict[str, Any]


def from_torch(kind: type[torch.optim.Optimizer], **options: Any) -> Optimizer:
    """An optimizer of a class such as `torch.optim.Adamax`, or a third party's, with the options of its constructor.

    Options that are floats become hyperparameters, those left at their default too, and may be schedules; of a tuple
    of floats each by itself: `betas_0`, `betas_1`. All others (whole numbers, bools, text, None) stay as they are.

    A torch optimizer looks at values and works in place, so this one runs step by step: inside `ft.compiled`,
    `ft.population` and other transforms, and where a gradient is to flow through the update, it raises `ArgumentError`; the
    optimizers of `ft.optim` itself have no such bounds. Steps have the very bits of the torch optimizer; `update` alone
    gives the difference to its params, rounded. The structure of the state is that after a first step, and stays.

    Raises `ArgumentError` for a class that needs a closure (LBFGS) or sparse gradients (SparseAdam), for one that
    depends on more than its `state` and the numbers of its group, and for options that the class does not take.

    >>> optimizer = from_torch(torch.optim.Adamax, lr=0.1, betas=(0.8, 0.99))
    >>> params = {"w": torch.ones(1)}
    >>> state = optimizer.init(params)
    >>> optimizer.update({"w": torch.ones(1)}, state, params)[0], sorted(state.hyper)
    ({'w': tensor([-0.1000])}, ['betas_0', 'betas_1', 'eps', 'lr', 'weight_decay'])
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ArgumentError(f"from_torch takes a class of optimizers and its options: torch.optim.Adamax, lr=0.1; got {kind!r}")
    _check_place(kind, ())
    its = TorchStep(kind, options)

    def init(params: Tree) -> TorchState:
        check_params(params)
        _check_place(kind, ())
        # A dry step on copies: what the class keeps has its structure from here on.
        flat, spec = tree.flatten(tree.map(lambda leaf: leaf.detach().clone(), params))
        _, kept = its.step(flat, [torch.zeros_like(leaf) for leaf in flat], None, its.first())
        trees, group = tree.map(torch.zeros_like, (tree.unflatten(spec, kept.params), kept.group))
        return TorchState(started(params), trees, group, place(its.settings, params))

    def update(grads: Tree, state: TorchState, params: Tree) -> tuple[Tree, TorchState]:
        check_state(state, TorchState)
        new, state = fused(grads, *tree.map(torch.clone, (state, params)))
        return tree.map(torch.sub, new, params), state

    def fused(grads: Tree, state: TorchState, params: Tree) -> tuple[Tree, TorchState]:
        check_state(state, TorchState)
        _check_place(kind, (grads, state, params))
        flat, spec = tree.flatten(params)
        # Some classes take the gradients' memory over.
        given = [grad.detach().clone() for grad in _dense(its.name, leaves_of(grads, params, spec, flat), params)]
        now = read(resolve(its.settings, state.hyper, state.steps), state.steps)
        old = Kept(tree.leaves_like(spec, state.kept, params), state.group) if state.steps.item() else None
        leaves, kept = its.step(flat, given, old, now)
        new = TorchState(state.steps + 1, tree.unflatten(spec, kept.params), kept.group, state.hyper)
        if not tree.same_structure(new, state):
            differs = tree.difference((state.kept, state.group), (new.kept, new.group))
            advice = "init fixes what a state holds, so give options that change it to from_torch"
            raise ArgumentError(f"{its.name} keeps other things than it did at first: {differs}; {advice}")
        return tree.unflatten(spec, leaves), new

    return Optimizer(init, update, fused, its.name, {**its.settings, **its.fixed})


def _check_place(kind: type, given: Tree) -> None:
    """Raise `ArgumentError` where values cannot be seen, or a gradient is to flow."""
    tracked = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(given))
    if not (tracked or inside_transform() or inside_tracing()):
        return
    from functrain.core import optim

    native = kind.__name__.lower()
    other = f"take ft.optim.{native}" if native in optim.__all__ else "take one of ft.optim itself, such as ft.optim.adamw"
    what = "no gradient flows through" if tracked else "inside a transform or a compiled step there are no values for"
    raise ArgumentError(f"{what} from_torch({kind.__name__}), which works in place: {other}, or step outside of it")


def _dense(name: str, grads: list[Tensor], params: Tree) -> list[Tensor]:
    sparse = [path for path, grad in zip(tree.paths(params), grads) if grad.layout != torch.strided]
    if sparse:
        raise TreeError(f"{name} was given a sparse gradient of {', '.join(tree.quoted(sparse))}: make it dense, .to_dense()")
    return grads
