"""Training that can be differentiated through: many steps as one function of the state and the batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.deferred import drawn
from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage, explain
from functrain.core.remat import remat
from functrain.core.step import Metrics, Step
from functrain.core.transforms import inside_unroll, unrolled
from functrain.core.tree import Tree
from functrain.engine.fold import checked_stack, repeat


def unroll(step: Step, steps: int, *, checkpoint: bool = True) -> Step:
    """`steps` steps, differentiable in all that floats in the state and the batches: `(state, batches) -> (state, metrics)`.

    As `repeat`, it takes batches stacked to `(steps, N, …)` and gives metrics `(steps,)`. Derivatives, by torch.func's grad,
    vjp, jvp and vmap in any order or by `.backward()`, flow

    - from hyperparameters, which are 0-d float64 tensors in the state: `ft.with_hyper(state, lr=rate)`, a schedule's numbers
      (`lr_peak`) included;
    - from initial params and carry: `unrolled.init(params)`, where `step.init`, outside of transforms, cuts its copies off;
      or `state._replace(params=params)`, where the optimizer's state does not depend on params (schedule-free's does);
    - from what floats in the batches: inputs, targets, loss weights;
    - to the new state, and to the metrics `loss` and `weight` (what a loss measures as `aux` is cut off).

    With `checkpoint`, memory grows as √steps: of segments of ⌈√steps⌉ steps only the first state is kept, and all but the last
    are computed again for the backward pass, from the same keys: at most one more forward pass. Values and gradients are the
    same with or without, bit by bit but for the sign of zeros; second derivatives up to rounding. A loop of steps has the same
    bits, too, unless those of the loss are others under torch.func (nn.LSTM's fused kernel). Where no derivative is taken it is
    `repeat(step, steps)`.

    What the loss closes over is a constant; with a derivative of its own it is a `LossError`, or without `checkpoint` passes
    unseen. Where a rule has a kink (clipping, sign, ReLU) the derivative is that of the side it is on.

    Raises `ArgumentError` for a step that donates or is compiled, for fewer than one step, and for stacks of another height.

    Sources: Maclaurin et al., "Gradient-based hyperparameter optimization through reversible learning", ICML 2015; Chen et al.,
    "Training deep nets with sublinear memory cost", 2016.

    >>> import functrain as ft
    >>> train = ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.sgd(0.1))
    >>> twice = ft.unroll(train, 2)
    >>> def distance(rate):
    ...     state, _ = twice(ft.with_hyper(twice.init(torch.tensor(0.0)), lr=rate), torch.ones(2, 3))
    ...     return 1 - state.params
    >>> torch.func.grad_and_value(distance)(torch.tensor(0.1))  # (1 − 2 lr)² and its derivative
    (tensor(-3.2000), tensor(0.6400))
    """
    whole = repeat(_differentiable(step), steps)
    segments = math.ceil(steps / math.ceil(math.sqrt(steps)))

    def segment(state: Any, batches: Tree) -> tuple[Any, Metrics]:
        with unrolled():
            new: tuple[Any, Metrics] = repeat(step, tree.batch_size(batches)).update(state, batches)
            return new

    again = remat(segment) if checkpoint else segment

    def init(params: Tree, **others: Any) -> Any:
        with unrolled():
            return step.init(params, **others)

    def update(state: Any, batches: Tree) -> tuple[Any, Metrics]:
        batches = drawn(batches)
        if not _differentiated((state, batches)):
            return whole.update(state, batches)
        checked_stack("unroll", batches, steps)
        *first, last = tree.divide(batches, segments)
        rows = []
        for part in first:
            state, metrics = _apart(again, state, part)
            rows.append(metrics)
        # What is kept of the last segment is used up first: to compute it again would save nothing.
        state, metrics = _apart(segment, state, last)
        return state, tree.concat([*rows, metrics])

    def stage() -> Stage:
        kept = f"the states before {segments} segments" if checkpoint else "all intermediate values"
        return Stage(f"unroll, {steps} steps as one function", {"kept for derivatives": kept}, [explain(step)])

    def remake(grad: Any) -> Step:
        return unroll(step.remade(grad), steps, checkpoint=checkpoint)

    return Step(init, update, stage, False, step.grad, remake, steps * step.takes)


def _differentiable(step: Step) -> Step:
    if not isinstance(step, Step):
        raise ArgumentError(f"unroll takes a step, got {explain(step).title}: write ft.unroll(ft.step(grad, optimizer), steps)")
    if step.donates or explain(step).has("compiled"):
        kind = "compiled" if explain(step).has("compiled") else "donating"
        raise ArgumentError(
            f"no derivative flows through a {kind} step: unroll the pure step inside, and compile outside, the step that is "
            "taken by the derivative: ft.compiled(ft.step(ft.grad(meta_loss), optimizer)), with ft.unroll(step, …) in meta_loss"
        )
    return step


def _differentiated(given: Tree) -> bool:
    if inside_unroll():
        return True
    return torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree.leaves(given))


def _apart(segment: Any, state: Any, batches: Tree) -> tuple[Any, Metrics]:
    """A segment whose gradients are summed by themselves before others are added, as they are where it is computed again."""
    flat, spec = tree.flatten(state)
    own = [leaf.view_as(leaf) for leaf in flat]
    before = {id(mine): leaf for mine, leaf in zip(own, flat)}
    new, metrics = segment(tree.unflatten(spec, own), batches)
    # What is handed through is still the caller's.
    return tree.map(lambda leaf: before.get(id(leaf), leaf), new), metrics
