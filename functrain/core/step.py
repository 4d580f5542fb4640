"""The step: a gradient and an optimizer as one pure function from state and batch to state and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.errors import ArgumentError, DonatedError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.grad import as_gradient
from functrain.core.heap import settled
from functrain.core.layout import Memo
from functrain.core.loss import measures
from functrain.core.optim.base import Optimizer, apply_updates, check_tensors, is_part, updated, uses
from functrain.core.optim.hyper import placed_in, scheduled, shown
from functrain.core.reduce.base import Gradient
from functrain.core.transforms import inside_unroll
from functrain.core.tree import Tree

Metrics = dict[str, Tensor]


class State(NamedTuple):
    """All there is to know about a run, as one tree.

    - `params`: the parameters;
    - `opt`: the optimizer's state, hyperparameters included;
    - `carry`: what the loss threads from step to step (batch-norm buffers, recurrent state), or None;
    - `key`: 0-d int64: the run's randomness; step i uses `fold_in(key, i)`;
    - `position`: 0-d int64: the steps taken, which is the index of the next batch.
    """

    params: Tree
    opt: Any
    carry: Tree
    key: Tensor
    position: Tensor

    def __repr__(self) -> str:
        leaves = [leaf for leaf in tree.leaves(self.params) if isinstance(leaf, Tensor)]
        params = f"{len(leaves)} tensors, {sum(leaf.numel() for leaf in leaves):,} numbers"
        where = self.position.tolist() if isinstance(self.position, Tensor) else self.position
        return f"<State at position {where}: params {params}; opt {type(self.opt).__name__}; carry {_sized(self.carry)}>"


def _sized(carry: Tree) -> str:
    return "none" if carry is None else f"{len(tree.leaves(carry))} tensors"


@dataclass(frozen=True)
class Step:
    """Two functions: `init(params, carry=None, seed=0) -> state` and `update(state, batch) -> (state, metrics)`.

    A step is called like its `update`. Combinators take a step and return one. With `donates`, update takes
    the state's buffers over, and the state that it was given is empty afterwards. `grad` is the gradient it takes, and
    `remade(grad)` the same step around another gradient. An update goes on by `takes` positions, and takes that many batches,
    stacked: more than one for `repeat` and `unroll`.
    """

    init: Callable[..., Any]
    update: Callable[[Any, Tree], tuple[Any, Metrics]]
    stage: Callable[[], Stage]
    donates: bool = False
    grad: Any = None
    remake: Callable[[Any], Step] | None = None
    takes: int = 1

    def remade(self, grad: Any) -> Step:
        """The same step around another gradient; `ArgumentError` for a step that was not made of one."""
        if self.remake is None:
            raise ArgumentError(f"this step ({explain(self).title}) is not made of a gradient that could be replaced")
        return self.remake(grad)

    def __call__(self, state: Any, batch: Tree) -> tuple[Any, Metrics]:
        return self.update(state, batch)

    def explain(self) -> Stage:
        """What a step runs."""
        return self.stage()


def step(grad: Any, optimizer: Optimizer, *, donate: bool = False) -> Step:
    """One step of training: gradient, reduction, update.

    `grad` is a gradient (`ft.grad(loss)` or a combinator around it), `optimizer` an `(init, update)` pair. The step

    - gives the gradient the randomness `fold_in(state.key, state.position)` when the loss declares `key`;
    - returns metrics as 0-d tensors: `loss` (the mean, of the params *before* the update), `weight`
      (what it is the mean over), every hyperparameter on a schedule, what an optimizer shows (`plateau`'s `scale`),
      and the loss's `aux` measures by name (`aux.loss`, `aux.lr` where the plain name is taken, `aux` for a bare tensor).

    With `donate` the state's buffers are updated in place, without memory of their own: the same values, and the
    state given is empty afterwards (`DonatedError` when it is used in a step again).

    Raises `TreeError` for a batch whose leaves disagree and `LossError` for a loss that breaks its contract.

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch @ params["w"]) ** 2
    >>> train = ft.step(ft.grad(loss), ft.optim.sgd(0.1))
    >>> state, metrics = train(train.init({"w": torch.ones(2)}), torch.ones(4, 2))
    >>> state.params, metrics["loss"], state.position
    ({'w': tensor([0.6000, 0.6000])}, tensor(4.), tensor(1))
    """
    as_gradient(grad)
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise ArgumentError(f"expected an optimizer, got {_what(optimizer)}")
    if is_part(optimizer):
        part = explain(optimizer).title
        chained = f"ft.optim.chain({part}(…), ft.optim.sgd(0.1))"
        raise ArgumentError(f"{part} changes gradients, and goes nowhere by itself: chain it, {chained}")
    spare: list[Tree] = []
    states = Memo()

    def init(params: Tree, *, carry: Tree = None, seed: int | Tensor = 0) -> State:
        settled()
        mine = tree.map(_copied, params)
        device = next((leaf.device for leaf in tree.leaves(mine)), torch.device("cpu"))
        key = (_key(seed) if isinstance(seed, Tensor) else random.key(seed)).to(device)
        position = torch.zeros((), dtype=torch.int64, device=device)
        opt = optimizer.init(mine)
        check_tensors("the state that the optimizer's init returned", opt)
        return State(mine, opt, tree.map(_copied, carry), key, position)

    def update(state: State, batch: Tree) -> tuple[State, Metrics]:
        check_owned(state)
        spare.clear()
        if state.position.ndim:
            raise TreeError("this is the state of a population: step it with ft.population(step), or take a member out of it")
        key = random.fold_in(state.key, state.position) if "key" in grad.uses else None
        taken = grad.finished(state.params, batch, carry=state.carry, key=key)
        old, _ = states.flatten(state)
        carry, plain = state.carry if taken.carry is None else taken.carry, _plain([*old, taken.loss])
        if plain:
            # The gradients' memory is let go of when the next step begins, as zero_grad does. Given back at the end of
            # this one, the heap shrinks, and 1000 page faults a step cost up to 5 % (1.9 M parameters).
            spare.append(taken.grads)
            carry = _apart_from(state.params, carry)
        params, opt = _updated(optimizer, taken, state, in_place=donate, plain=plain)
        told = {**scheduled(optimizer, state.opt), **shown(optimizer, opt)}
        metrics = {"loss": taken.loss, "weight": taken.weight, **told, **measures(taken.aux, told)}
        new = State(params, opt, carry, state.key, state.position + 1)
        if not donate or not plain:
            return new, metrics
        return taken_over(old, new, (state.key, state.carry, placed_in(state.opt)), states), metrics

    def stage() -> Stage:
        kernel = "tensor arithmetic"
        if getattr(optimizer, "fused", None) is not None:
            kernel = f"in place, all leaves at once ({kernel} inside a transform or compiler)"
        facts = {"state": "donated: updated in place" if donate else "pure: a new state each step", "update": kernel}
        return Stage("step", facts, [explain(grad), explain(optimizer)])

    return Step(init, update, stage, donate, grad, lambda other: step(other, optimizer, donate=donate))


def _what(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, torch.optim.Optimizer):
        return f"torch's {kind.__name__}: write ft.optim.from_torch(torch.optim.{kind.__name__}, lr=…), or ft.optim's own"
    if isinstance(value, tuple):
        return "a tuple: give it names, in a NamedTuple or class with `init` and `update`"
    return f"{explain(value).title}: for instance ft.optim.adamw(1e-3)"


def _apart_from(params: Tree, carry: Tree) -> Tree:
    # A loss may hand its params on as carry: they are about to change, in this step or a donating one.
    if carry is None:
        return None
    flat, spec = tree.flatten(carry)
    return tree.unflatten(spec, apart(flat, tree.leaves(params)))


def _updated(optimizer: Any, taken: Gradient, state: State, in_place: bool, plain: bool) -> tuple[Tree, Any]:
    """The params and optimizer state after an update, in place where the optimizer has a way and it may."""
    extra = {"loss": taken.loss}
    if "key" in uses(optimizer):
        extra["key"] = random.fold_in(random.fold_in(state.key, _UPDATE), state.position)
    fused = getattr(optimizer, "fused", None)
    if fused is None or not plain:
        updates, opt = updated(optimizer.update, optimizer, taken.grads, state.opt, state.params, extra)
        return apply_updates(state.params, updates), opt
    with torch.no_grad():
        params, opt = (state.params, state.opt) if in_place else tree.map(torch.clone, (state.params, state.opt))
        return updated(fused, optimizer, taken.grads, opt, params, extra)


# The optimizer's randomness is another stream than the loss's.
_UPDATE = 0x3C6EF372FE94F82B


def _key(seed: Tensor) -> Tensor:
    if seed.ndim or seed.dtype != torch.int64:
        raise ArgumentError(f"a seed is an int, or a key (0-d int64), got a tensor {tuple(seed.shape)} of {seed.dtype}")
    return seed.clone()


def _copied(leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise TreeError(f"params and carry are trees of tensors, got a leaf of type {type(leaf).__name__}")
    return leaf.clone() if inside_unroll() else leaf.detach().clone()


def _plain(leaves: list[Tensor]) -> bool:
    # Inside a transform or a trace the update has to be plain arithmetic; so it has where a gradient is to flow through.
    if inside_unroll():
        return False
    return not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves))


# --- donation --------------------------------------------------------------------------------------------------


_NOTHING = torch.empty(0)


def moved(leaf: Tensor) -> Tensor:
    """The same buffer as a new tensor, with `leaf` left empty: whoever reads `leaf` afterwards finds no elements."""
    mine = leaf.data
    leaf.data = _NOTHING if leaf.is_cpu else leaf.new_empty(0)
    return mine


def taken_over(old: list[Tensor], new: Tree, kept: Tree, memo: Memo | None = None) -> Tree:
    """`new`, with the buffers that it shares with the leaves `old` moved over, and the rest of `old` emptied.

    An old state can then never be mistaken for a whole one. What of `kept` is handed through as it was (a key,
    a hyperparameter) stays: states from before the old one may share it.
    """
    flat, layout = (memo or Memo()).flatten(new)
    shared = {id(leaf) for leaf in flat}
    handed = {id(leaf) for leaf in tree.leaves(kept)} & shared
    mine = {id(leaf): moved(leaf) for leaf in old if id(leaf) not in handed}
    return layout.built([mine.get(id(leaf), leaf) for leaf in flat])


def apart(leaves: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """The leaves, cloned where they share memory with one of `others` or with an earlier leaf."""
    taken = {leaf.untyped_storage()._cdata for leaf in others}
    mine = []
    for leaf in leaves:
        own = leaf.clone() if leaf.untyped_storage()._cdata in taken else leaf
        taken.add(own.untyped_storage()._cdata)
        mine.append(own)
    return mine


def check_owned(state: Any) -> None:
    """Raise `DonatedError` when a donating step has already taken this state's buffers over."""
    position = getattr(state, "position", None)
    if position is None:
        raise ArgumentError(f"expected a state as step.init(params) makes it, got {type(state).__name__}")
    if position.ndim == 1 and position.numel() == 0:
        raise DonatedError(
            "this state was given to a donating step, which took its buffers over: go on with the state that the step "
            "returned, or make the step with donate=False"
        )
