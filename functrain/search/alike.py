"""Whether experiments differ only in numbers of their states, so that one population may stand for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.deferred import drawn
from functrain.core.explain import explain
from functrain.core.tree import Tree
from functrain.engine.experiment import Experiment
from functrain.engine.population import population

# Two steps: momentum, for one, changes nothing in the first.
_STEPS = 2
# The same operations on the same numbers: what is left are atomics on a GPU, in the last bits.
_SAME = 1e-5
# Rounding alone, as seen in the change that a step makes: vmapped kernels add up in another order.
_ROUNDING = 1e-3
_LOSS = 1e-4
_NUMBER = re.compile(r"[-+]?\d[\d_,.]*(?:e[-+]?\d+)?|\binf\b|\bnan\b")


def difference(one: Experiment, mine: Any, other: Experiment, theirs: Any) -> str:
    """Why `other` cannot be a member of the population that `one` leads, in words; "" when it can.

    Both have to agree in epochs, in structure and shapes of their initial states (`mine`, `theirs`), in
    what `explain` says of the source, and, but for numbers, of the step; in the batches at the first,
    middle and last step; and, the point of it all, the leader's step has to do to the other's state what
    the other's own step does, over two steps. A number used elsewhere, such as in a closure, shows there.
    """
    if one.step.donates or other.step.donates:
        return "its step takes the state's buffers over (compiled or donate=True), and a population cannot"
    if one.epochs != other.epochs:
        return f"epochs differ: {one.epochs} and {other.epochs}"
    if not one.steps:
        return "there are no steps to run together"
    return _states(mine, theirs) or _texts(one, other) or _batches(one, other) or _steps(one, other, theirs)


def _states(mine: Any, theirs: Any) -> str:
    if not tree.same_structure(mine, theirs):
        return f"the initial states differ in structure: {tree.difference(mine, theirs)}"
    for (name, leaf), twin in zip(tree.named(mine).items(), tree.leaves(theirs)):
        if (leaf.shape, leaf.dtype, leaf.device) != (twin.shape, twin.dtype, twin.device):
            return f"the initial states differ at {name}: {_kind(leaf)} and {_kind(twin)}"
    return ""


def _kind(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)} on {leaf.device}"


def _texts(one: Experiment, other: Experiment) -> str:
    if one.train is not other.train and (len(one.train), str(explain(one.train))) != (
        len(other.train),
        str(explain(other.train)),
    ):
        return "the train sources differ (see explain of each): a population shares its batches"
    if _NUMBER.sub("#", str(explain(one.step))) != _NUMBER.sub("#", str(explain(other.step))):
        return "the steps differ in more than numbers (see explain of each)"
    return ""


def _batches(one: Experiment, other: Experiment) -> str:
    if one.train is other.train:
        return ""
    mine, theirs = one.train.repeat(), other.train.repeat()
    for position in sorted({0, one.steps // 2, one.steps - 1}):
        a, b = drawn(mine(position)), drawn(theirs(position))
        same = tree.same_structure(a, b) and all(map(_equal, tree.leaves(a), tree.leaves(b)))
        if not same:
            return f"the train sources give different batches at step {position}: a population shares them"
    return ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _steps(one: Experiment, other: Experiment, state: Any) -> str:
    if one.step is other.step:
        return ""
    endless = one.train.repeat()
    for position in range(min(_STEPS, one.steps)):
        batch = endless(position)
        by_one, one_metrics = one.step(state, batch)
        by_other, other_metrics = other.step(state, batch)
        place = _apart(state, by_one, by_other, _SAME) or _apart_losses(one_metrics, other_metrics, _SAME)
        if place:
            return (
                f"its own step does not do what the first one's does ({place} at step {position}): "
                "a number is used outside of the state"
            )
        state = by_other
    return ""


def strays(experiments: Sequence[Experiment], states: Sequence[Any]) -> str:
    """How the population's first step strays from the members' own, beyond rounding; "" when it does not."""
    batch = experiments[0].train(0)
    step = population(experiments[0].step)
    joined, metrics = step(step.init(states), batch)
    for number, (experiment, state, own) in enumerate(zip(experiments, states, tree.unstack(joined))):
        alone, alone_metrics = experiment.step(state, batch)
        mine = {name: value[number] for name, value in metrics.items()}
        place = _apart(state, own, alone, _ROUNDING) or _apart_losses(mine, alone_metrics, _LOSS)
        if place:
            return f"the population's first step is not that of member {number} alone ({place})"
    return ""


def _apart(before: Tree, a: Tree, b: Tree, tolerance: float) -> str:
    """The first leaf in which two states after `before` differ by more than a share of the change."""
    if not tree.same_structure(before, a, b):
        return "its state changes structure"
    rows = zip(tree.paths(a), tree.leaves(before), tree.leaves(a), tree.leaves(b))
    return next((name for name, old, one, two in rows if not _close(old, one, two, tolerance)), "")


def _close(old: Tensor, a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not a.is_floating_point() or a.shape != b.shape:
        return torch.equal(a, b)
    # Equal infinities and two nans are equal too; their difference is nan.
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return True
    gap = torch.where(same, 0, a.double() - b.double()).norm()
    change = (b.double() - old.double()).norm()
    if tolerance <= _SAME:
        return bool(gap <= tolerance * change)
    eps = torch.finfo(a.dtype).eps
    return bool(gap <= max(tolerance, 8 * eps) * change + 4 * eps * b.double().norm())


def _apart_losses(mine: Any, theirs: Any, tolerance: float) -> str:
    a, b = mine["loss"].double(), theirs["loss"].double()
    return "" if torch.allclose(a, b, rtol=tolerance, atol=1e-7, equal_nan=True) else "loss"
