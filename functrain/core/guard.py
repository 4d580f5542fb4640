"""The guard: a step that never goes on from numbers that are not finite."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.around import check_inner, check_single
from functrain.core.errors import ArgumentError, NonFiniteError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.health import all_finite, counted
from functrain.core.reduce.base import visible
from functrain.core.step import Metrics, Step
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree

Policy = Literal["skip", "raise"]


def guard(step: Step, policy: Policy = "skip") -> Step:
    """The same step on finite numbers; where one gives NaN or infinities, the old params stay.

    A step is bad when its loss is not finite, or a floating leaf of params, optimizer state or carry that was finite before
    it is not afterwards. Then

    - `"skip"`: params, optimizer state and carry are those before the step; the position advances, so that the next step uses
      the next batch. The metrics stay as they were measured, and `skipped` beside them is 1.0 (else 0.0);
    - `"raise"`: `NonFiniteError` says the step, its loss and what is not finite. The state given is as it was. This looks
      at values, on a GPU it waits for them: not inside `ft.compiled`, `ft.population` or any other transform (`ArgumentError`).

    All else has the same bits with or without a guard. Skipping works where steps do: in `ft.compiled(ft.guard(step))`; in
    `ft.population(ft.guard(step))`, where each member is guarded by itself; in `ft.tbptt(ft.guard(step), …)`, where each window
    is; around `ft.tbptt(step, …)` and `ft.repeat(step, n)`, where all windows and all n steps count as one. What a guard inside
    has skipped is not skipped again. `ft.train` leaves skipped steps out of its means, and counts them.

    Raises `ArgumentError` for a step that donates (its old state is gone), and `TreeError` for the state of a population.

    >>> import functrain as ft
    >>> train = ft.guard(ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.sgd(0.25)))
    >>> state, _ = train(train.init(torch.tensor(0.0)), torch.tensor([1.0, 3.0]))
    >>> state, metrics = train(state, torch.tensor([1.0, float("nan")]))
    >>> state.params, state.position, metrics["loss"], metrics["skipped"]
    (tensor(1.), tensor(2), tensor(nan), tensor(1.))
    """
    check_inner(step, "guard")
    if policy not in get_args(Policy):
        raise ArgumentError(f"policy must be 'skip' or 'raise', got {policy!r}")

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        check_single(state, "guard")
        if policy == "raise" and (inside_transform() or inside_tracing()):
            raise ArgumentError(
                "guard(step, 'raise') looks at values, and inside a compiled step, a population or any other transform there "
                "are none to look at: take ft.guard(step, 'skip') there, or ft.guard(ft.compiled(step, donate=False), 'raise')"
            )
        new, metrics = step.update(state, batch)
        good = _good(state, new, metrics)
        if policy == "raise":
            if not good:
                raise _error(state, new, metrics["loss"])
            return new, metrics
        skipped = (~good).to(torch.float32)
        if "skipped" in metrics:
            # What guards inside (of windows, of repeated steps) have skipped.
            skipped = torch.maximum(skipped, metrics["skipped"])
        return chosen(good, new, state), {**metrics, "skipped": skipped}

    def stage() -> Stage:
        facts = {
            "skip": "where the step is not finite, params, optimizer state and carry stay, the position advances",
            "raise": "where the step is not finite, an error",
        }
        return Stage("guard", {"policy": f"{policy}: {facts[policy]}"}, [explain(step)])

    def remake(grad: Any) -> Step:
        return guard(step.remade(grad), policy)

    return Step(step.init, update, stage, grad=step.grad, remake=remake, takes=step.takes)


class _Kept(NamedTuple):
    """What of a state a skipped step leaves as it was."""

    params: Tree
    opt: Tree
    carry: Tree


def _kept(state: Any) -> _Kept:
    return _Kept(state.params, state.opt, state.carry)


def _good(old: Any, new: Any, metrics: Metrics) -> Tensor:
    """Whether a step was finite: 0-d bool."""
    after, spec = tree.flatten(_kept(new))
    before = tree.leaves_like(spec, _kept(old), _kept(new))
    # What a step hands through is as good as it was.
    pairs = [(leaf, was) for leaf, was in zip(after, before) if leaf is not was]
    if visible(metrics["loss"]):
        good = all_finite([metrics["loss"], *(leaf for leaf, _ in pairs)])
        if good:
            return good
    measured = all_finite([metrics["loss"]])
    if "skipped" in metrics:
        # A guard inside has dealt with that loss.
        measured = measured | (metrics["skipped"] > 0).any()
    spared = [all_finite([leaf]) | ~all_finite([was]) for leaf, was in pairs if _floating(leaf)]
    return torch.stack([measured, *spared]).all()


def _floating(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def chosen(good: Tensor, new: Any, old: Any) -> Any:
    """The new state where `good`, a 0-d bool, holds; else, at the new position, what is left of the old one."""
    if visible(good):
        return new if good else new._replace(**_kept(old)._asdict())

    def choose(path: str, leaf: Tensor, was: Tensor) -> Tensor:
        if leaf is was:
            return leaf
        if leaf.shape != was.shape:
            raise TreeError(
                "inside a graph or a transform a guard, or a player at rest, cannot go back where a step changes shapes: "
                f"{path} was {tuple(was.shape)} and is {tuple(leaf.shape)}"
            )
        return torch.where(good, leaf, was)

    flat, spec = tree.flatten(_kept(new))
    rows = zip(tree.paths(_kept(new)), flat, tree.leaves(_kept(old)))
    return new._replace(**tree.unflatten(spec, [choose(*row) for row in rows])._asdict())


def _error(old: Any, new: Any, loss: Tensor) -> NonFiniteError:
    pairs = zip(tree.paths(_kept(new)), tree.leaves(_kept(new)), tree.leaves(_kept(old)))
    named = {path: leaf for path, leaf, was in pairs if not all_finite([leaf]) and all_finite([was])}
    where = "; ".join(f"{path} would have {counts}" for path, counts in counted(named))
    place, value = int(old.position), loss.detach().reshape(-1).tolist()
    return NonFiniteError(
        f"step {place + 1} (the batch of position {place}) is not finite: its loss is {value[0] if len(value) == 1 else value}"
        f"{'; ' + where if where else ''}. The state given is as it was. Look at that batch, at square roots, logarithms and "
        "divisions at 0 in the loss, or lower the learning rate; policy='skip' passes over such batches"
    )
