"""Optimizers for parts of the params: another one for each group of leaves, or none for some.

A group's optimizer is given its leaves as `{path: leaf}`, and its state knows no others.

Source: optax's partition and masked, and torch.optim's parameter groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.optim.base import (
    Optimizer,
    check_optimizers,
    check_params,
    check_state,
    fused_or_updated,
    leaves_of,
    share_of,
    updated,
    uses,
)
from functrain.core.optim.selection import Groups, Labelling, Labels, Where, grouping, labelling_of, selecting, told
from functrain.core.tree import Tree


class PartitionState(NamedTuple):
    """The state of each group's optimizer, by label."""

    inner: dict[str, Any]


def partition(optimizers: Mapping[str, Any], labels: Labels) -> Optimizer:
    """Every leaf updated by the optimizer of its label, as if that had been given its leaves alone.

    `labels` says which label a leaf has:

    - `{"*.bias": "plain", "*": "decayed"}`: that of the first glob that matches its dotted path (as fnmatch.fnmatchcase has
      them, so that `*` goes over dots);
    - a function of the dotted path;
    - a tree like params, of labels.

    Norms are then those of a group: `chain(clip_by_norm(1.0), partition(…))` clips all leaves together,
    `partition({"a": chain(clip_by_norm(1.0), …), …}, …)` those of one label. Hyperparameters that several groups have are
    qualified by label: `ft.with_hyper(state, **{"plain.lr": 0.1})`. It is fused where one of the optimizers is.

    Raises `ArgumentError` for no optimizers, or one that is none; and at init `TreeError` for paths that no pattern matches,
    labels without an optimizer or without a leaf, and patterns that match nothing.

    >>> from functrain.core.optim import sgd
    >>> split = partition({"fast": sgd(1.0), "slow": sgd(0.1)}, {"out.*": "fast", "*": "slow"})
    >>> params = {"in": torch.ones(1), "out": {"w": torch.ones(1)}}
    >>> split.update(params, split.init(params), params)[0]
    {'in': tensor([-0.1000]), 'out': {'w': tensor([-1.])}}
    """
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ArgumentError(f"partition takes {{label: optimizer}}, got {optimizers!r}")
    wrong = [label for label in optimizers if not isinstance(label, str) or not label or "." in label]
    if wrong:
        raise ArgumentError(f"partition: labels are strings without dots, not empty, got {wrong[0]!r}")
    check_optimizers("partition", {f"optimizer {label!r}": one for label, one in optimizers.items()})
    labelling = labelling_of("partition", labels, list(optimizers))
    return _partition("partition", dict(optimizers), labelling, {"labels": told(labels)})


def freeze(optimizer: Any, where: Where) -> Optimizer:
    """The optimizer for all leaves but those whose path `where` selects: these stay as they are and have no state.

    `where` is a glob, several, or a function of the dotted path. What frozen leaves' gradients would do to a norm that is
    clipped depends on the order: `freeze(chain(clip_by_norm(1.0), adamw(lr)), where)` does not see them,
    `chain(clip_by_norm(1.0), freeze(adamw(lr), where))` does. Gradients are still computed.

    Raises `ArgumentError` for what is no optimizer or no selection; and at init `TreeError` for a glob or function that matches
    nothing.

    >>> from functrain.core.optim import sgd
    >>> frozen = freeze(sgd(1.0), "embedding.*")
    >>> params = {"embedding": {"w": torch.ones(1)}, "out": {"w": torch.ones(1)}}
    >>> frozen.update(params, frozen.init(params), params)[0]
    {'embedding': {'w': tensor([0.])}, 'out': {'w': tensor([-1.])}}
    """
    check_optimizers("freeze", {"what it is given": optimizer})
    labelling = selecting("freeze", where, "frozen", "trained")
    return _partition("freeze", {"trained": optimizer, "frozen": _STILL}, labelling, {"where": told(where)})


def masked(part: Any, where: Where) -> Optimizer:
    """The part for leaves whose path `where` selects; what comes in for the others passes on as it is.

    `where` is a glob, several, or a function of the dotted path. Raises `ArgumentError` for what is no part or no selection;
    and at init `TreeError` for a glob or function that matches nothing.

    >>> from functrain.core.optim import chain, clip, sgd
    >>> clipped = chain(masked(clip(0.1), "out.*"), sgd(1.0))
    >>> params = {"in": torch.ones(1), "out": {"w": torch.ones(1)}}
    >>> clipped.update(params, clipped.init(params), params)[0]
    {'in': tensor([-1.]), 'out': {'w': tensor([-0.1000])}}
    """
    check_optimizers("masked", {"what it is given": part})
    labelling = selecting("masked", where, "selected", "others")
    return _partition("masked", {"selected": part, "others": _AS_IT_IS}, labelling, {"where": told(where)})


_STILL = Optimizer(
    init=lambda params: (),
    update=lambda grads, state, params: (tree.map(torch.zeros_like, params), state),
    fused=lambda grads, state, params: (params, state),
    name="no update",
)
_AS_IT_IS = Optimizer(init=lambda params: (), update=lambda grads, state, params: (grads, state), name="passed on", part=True)


def _partition(name: str, optimizers: dict[str, Any], labelling: Labelling, options: dict[str, Any]) -> Optimizer:
    groups_of = grouping(list(optimizers), labelling)

    def init(params: Tree) -> PartitionState:
        check_params(params)
        flat, spec = tree.flatten(params)
        groups = groups_of(spec)
        return PartitionState({label: one.init(_taken(flat, groups[label])) for label, one in optimizers.items()})

    def each(way: Callable[..., Any], grads: Tree, state: PartitionState, params: Tree, extra: Any) -> tuple[Tree, Any]:
        """Every group's leaves and state by one way of its optimizer, and the leaves in their places again."""
        check_state(state, PartitionState)
        flat, spec = tree.flatten(params)
        flat_grads = leaves_of(grads, params, spec, flat)
        results: list[Tensor] = [*flat]
        states = {}
        for place, (label, group) in enumerate(_groups(groups_of(spec), state).items()):
            one = optimizers[label]
            its = share_of(extra, one, place)
            found, states[label] = way(one, _taken(flat_grads, group), state.inner[label], _taken(flat, group), its)
            for path, index in group.items():
                results[index] = found[path]
        return tree.unflatten(spec, results), PartitionState(states)

    def update(grads: Tree, state: PartitionState, params: Tree, **extra: Tensor) -> tuple[Tree, PartitionState]:
        return each(_updated, grads, state, params, extra)

    def fused(grads: Tree, state: PartitionState, params: Tree, **extra: Tensor) -> tuple[Tree, PartitionState]:
        return each(fused_or_updated, grads, state, params, extra)

    used = frozenset().union(*map(uses, optimizers.values()))
    faster = fused if any(getattr(one, "fused", None) is not None for one in optimizers.values()) else None
    return Optimizer(init, update, faster, name, options, used, optimizers)


def _updated(optimizer: Any, grads: Tree, state: Any, params: Tree, extra: Any) -> tuple[Tree, Any]:
    return updated(optimizer.update, optimizer, grads, state, params, extra)


def _taken(leaves: list[Tensor], group: dict[str, int]) -> dict[str, Tensor]:
    return {path: leaves[place] for path, place in group.items()}


def _groups(groups: Groups, state: PartitionState) -> Groups:
    if set(groups) != set(state.inner):
        raise TreeError(f"expected the states of {sorted(groups)}, got those of {sorted(state.inner)}: made by another init")
    return groups
