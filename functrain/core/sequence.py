"""Sequences: losses over time, windows of it, and backpropagation truncated at their borders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.core import loss as losses
from functrain.core import random, reduce, tree
from functrain.core.deferred import drawn
from functrain.core.errors import ArgumentError, LossError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.grad import Grad, as_gradient, checked_size, summed
from functrain.core.loss import Losses
from functrain.core.reduce.base import Gradient, Reducer
from functrain.core.step import Metrics, Step
from functrain.core.tree import Tree

Start = Tree | Callable[[Tree], Tree]


def length(batch: Tree) -> int:
    """The length T that all leaves `(N, T, …)` of a batch of sequences share; `TreeError` when they do not."""
    named = tree.named(batch)
    sizes = {tuple(leaf.shape)[1] if leaf.ndim > 1 else None for leaf in named.values()}
    if len(sizes) != 1 or None in sizes:
        seen = ", ".join(f"{path or 'the batch'}: {tuple(leaf.shape)}" for path, leaf in named.items())
        raise TreeError(f"sequences have leaves (N, T, …) with one T; got {seen}")
    (size,) = sizes
    assert size is not None
    if size == 0:
        raise TreeError("the sequences are empty (T = 0)")
    return size


def windows(batch: Tree, size: int) -> list[Tree]:
    """Sequences `(N, T, …)` as windows `(N, size, …)`, in order; the last one is kept when it is shorter.

    >>> [part.tolist() for part in windows(torch.arange(5).reshape(1, 5), 2)]
    [[[0, 1]], [[2, 3]], [[4]]]
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ArgumentError(f"a window has at least 1 time step, got {size!r}")
    length(batch)
    flat, spec = tree.flatten(batch)
    columns = [leaf.split(size, dim=1) for leaf in flat]
    return [tree.unflatten(spec, list(row)) for row in zip(*columns)]


def seqloss(loss: Callable[..., Any]) -> Callable[..., Losses]:
    """A loss over sequences out of a loss over one time step: applied at each t, with the carry from t − 1.

    `loss(params, batch_t, …)` sees leaves `(N, …)` and returns losses `(N,)` (or `(losses, weights)`, with a carry
    when it declares one); the result takes leaves `(N, T, …)` and returns losses `(N, T)`, so that the mean over them
    is the mean over examples and time. A `key` is folded with t.

    >>> over_time = seqloss(lambda params, x: (x - params) ** 2)
    >>> over_time(torch.tensor(1.0), torch.tensor([[1.0, 2.0, 3.0]])).losses
    tensor([[0., 1., 4.]])
    """
    uses = losses.declared(loss)

    def one(params: Tree, batch: Tree, carry: Tree, key: Tensor | None) -> Losses:
        rows: list[Losses] = []
        for time in range(length(batch)):
            now = tree.map(lambda leaf, time=time: leaf[:, time], batch)
            given = {"carry": carry, "key": None if key is None else random.fold_in(key, time)}
            row = losses.normalised(loss(params, now, **{name: given[name] for name in uses}), "carry" in uses)
            carry = row.carry
            rows.append(row)
        columns = zip(*(row._replace(carry=None) for row in rows))
        values, weights, aux, _ = (_over_time(column) for column in columns)
        return Losses(values, weights, aux, carry)

    # The signature is the declaration: the loss over time declares what the loss over one step does.
    if uses == {"carry", "key"}:
        return lambda params, batch, *, carry, key: one(params, batch, carry, key)
    if uses == {"carry"}:
        return lambda params, batch, *, carry: one(params, batch, carry, None)
    if uses == {"key"}:
        return lambda params, batch, *, key: one(params, batch, None, key)
    return lambda params, batch: one(params, batch, None, None)


def _over_time(column: tuple[Tree, ...]) -> Tree:
    return None if column[0] is None else tree.map(lambda *steps: torch.stack(steps, dim=1), *column)


def tbptt(inner: Any, window: int, start: Start = None) -> Any:
    """Truncated backpropagation through time: state crosses from window to window, gradient does not.

    A batch of sequences `(N, T, …)` is cut into windows of `window` time steps (the last may be shorter). The loss
    declares `carry`, and starts each batch from `start`: a tree of leaves `(N, …)`, or a function from the batch to one.

    - `tbptt(grad, window, start)`: a gradient: the sum over the windows, at the same params;
    - `tbptt(step, window, start)`: a step that updates after each window, and still counts as one step: metrics
      are means over the windows (weighted), randomness is folded with the window.

    Where `parallel` cuts the batches inside, the gradient has to say that its carry is cut with them:
    `ft.parallel(ft.grad(loss, lanes=True), …)`.

    A window as long as the sequence is full backpropagation. Raises `LossError` for a loss without carry.

    Source: Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", Neural Computation 1990.

    >>> from functrain.core.grad import grad
    >>> def loss(params, x, *, carry):
    ...     hidden = carry + params * x.sum(1)
    ...     return hidden, hidden
    >>> g = tbptt(grad(loss), 2, lambda x: torch.zeros(len(x)))
    >>> g(torch.tensor(1.0), torch.ones(3, 4)).grads
    tensor(12.)
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ArgumentError(f"a window has at least 1 time step, got {window!r}")
    return _step(inner, window, start) if isinstance(inner, Step) else Tbptt(as_gradient(inner), window, start)


def _started(start: Start, batch: Tree) -> Tree:
    carry = start(batch) if callable(start) else start
    if carry is None:
        raise LossError("tbptt needs the carry that a sequence starts with: tbptt(…, window, start=lambda batch: zeros)")
    if tree.batch_size(carry) != tree.batch_size(batch):
        raise TreeError(
            f"start has N = {tree.batch_size(carry)}, the batch N = {tree.batch_size(batch)}: a carry has a lane for each "
            "example, leaves (N, …); turn nn.LSTM's (layers, N, H) around in the loss, h.transpose(0, 1)"
        )
    return carry


class Tbptt:
    """A gradient over windows of sequences: what `tbptt(grad, …)` returns."""

    lanes = True

    def __init__(self, grad: Any, window: int, start: Start) -> None:
        if "carry" not in grad.uses:
            raise LossError("tbptt threads a carry, and the loss does not declare one: write loss(params, batch, *, carry)")
        _check_lanes(grad)
        self.grad, self.window, self.start = grad, window, start
        self.uses = grad.uses - {"carry"}
        self.reduce: Reducer = grad.reduce if grad.reduce.linear else reduce.mean

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        batch = drawn(batch)
        size = checked_size(batch)
        carry = _started(self.start, batch)
        keys = random.example_keys(key, size) if key is not None and "key" in self.uses else None
        total = None
        for number, part in enumerate(windows(batch, self.window)):
            folded = None if keys is None else random.fold_in(keys, number)
            taken = summed(self.grad, params, part, carry=carry, key=folded)
            # No gradient of this call's crosses windows: each is one of its own. Derivatives of what is learned may.
            carry = taken.carry
            total = reduce.add(total, taken._replace(carry=None))
        assert total is not None
        return total

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        """The sum over the windows, finished by the gradient's reducer."""
        return self.reduce.finish(self(params, batch, key=key))

    def explain(self) -> Stage:
        """The window, and the gradient inside."""
        facts = {"carry": "crosses windows, cut off from the gradient"}
        return Stage(f"tbptt, windows of {self.window}", facts, [explain(self.grad)])


def _check_lanes(grad: Any) -> None:
    whole = grad is None or isinstance(grad, Grad) or getattr(grad, "whole", False)
    if not whole and not grad.lanes:
        raise LossError(
            "tbptt's carry has a lane for each example, and the gradient inside cuts batches: say that it is to cut the carry "
            "too, ft.parallel(ft.grad(loss, lanes=True), …)"
        )


def _step(step: Step, window: int, start: Start) -> Step:
    _check_lanes(step.grad)

    def update(state: Any, batch: Tree) -> tuple[Any, Metrics]:
        key, position = state.key, state.position
        batch = drawn(batch)
        outer, rows = state.carry, []
        state = state._replace(carry=_started(start, batch))
        for number, part in enumerate(windows(batch, window)):
            try:
                state, metrics = step.update(state._replace(key=random.fold_in(key, number), position=position), part)
            except LossError as error:
                if "sum to zero" not in str(error):
                    raise
                raise LossError(
                    f"{error} (in window {number} of tbptt(step, …), each an update: where windows are nothing but padding, "
                    "sum over all of them instead, ft.step(ft.tbptt(ft.grad(loss), …), …))"
                ) from error
            rows.append(metrics)
        return state._replace(carry=outer, key=key, position=position + 1), _mean(rows)

    def stage() -> Stage:
        return Stage(f"tbptt, an update each window of {window}", {}, [explain(step)])

    if step.donates:
        raise ArgumentError("tbptt cannot be made of a donating step: donate outside, ft.compiled(ft.tbptt(step, …))")
    return Step(step.init, update, stage, grad=step.grad, remake=lambda grad: _step(step.remade(grad), window, start))


def _mean(rows: list[Metrics]) -> Metrics:
    weights = torch.stack([row["weight"] for row in rows])
    shares = weights / weights.sum()
    means = {name: (torch.stack([row[name] for row in rows]) * shares).sum().to(rows[0][name].dtype) for name in rows[0]}
    return means | {"weight": weights.sum()}
