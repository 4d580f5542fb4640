"""The gradient of a per-example loss, as an unfinished sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.core import loss as losses
from functrain.core import random, reduce, tree
from functrain.core.deferred import drawn
from functrain.core.entries import Entry, Names, check_names, entry
from functrain.core.errors import ArgumentError, LossError, TreeError
from functrain.core.explain import Stage, explain, times_params
from functrain.core.layout import Memo
from functrain.core.reduce.base import Gradient, Reducer, checked_weight
from functrain.core.transforms import inside_unroll
from functrain.core.tree import Tree


class Grad:
    """The gradient of `loss`: `grad(params, batch, *, carry=None, key=None) -> Gradient`, an unfinished sum.

    - `params`: any tree of floating tensors (with `of`: floating in that entry); `batch`: any tree of tensors `(N, …)`;
    - `carry`: what the loss threads, when it declares `carry`;
    - `key`: 0-d, or `(N,)` with one for each example, when the loss declares `key`; the loss gets `(N,)`.

    `grad.finished(…)` takes the same and gives the mean over the batch.

    It nests under torch.func's grad and vmap and under compilation. Where nothing surrounds it, torch's own autograd does
    the work: torch.func would lose fused kernels (nn.LSTM: 6 ms against 20 ms) and 150 µs of overhead a call.
    A tensor that the loss closes over is a constant to it: what is to be differentiated goes through
    `params` or `batch`.

    Raises `LossError` where the loss breaks its contract, `TreeError` for leaves that disagree on N, an empty
    batch, or params that are not floating.
    """

    def __init__(self, loss: Callable[..., Any], lanes: bool = False, of: Names | None = None) -> None:
        check_names(of)
        self.loss = loss
        self.lanes = lanes
        self.of = of
        self.uses = losses.declared(loss)
        self.reduce: Reducer = reduce.mean
        self._params, self._batches = Memo(), Memo()

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        return self._take(params, batch, carry, key, finish=False)

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        """The same, divided by the weight: its cost is one division of a scalar, before the backward pass."""
        return self._take(params, batch, carry, key, finish=True)

    def _take(self, params: Tree, batch: Tree, carry: Tree, key: Tensor | None, finish: bool) -> Gradient:
        batch = drawn(batch)
        batch_leaves, rows_of = self._batches.flatten(batch)
        size = checked_size(batch, batch_leaves)
        losses.missing(self.uses, carry, key)
        keys = random.example_keys(key, size) if key is not None and "key" in self.uses else None
        mine = entry(params, self.of, self._params)
        check_params(mine)
        flat = mine.leaves if self.of is None else tree.leaves(params)
        given = [*batch_leaves, *tree.leaves((carry, keys))]
        tracked = torch.is_grad_enabled() and _tracked([*flat, *given])
        # Traced, too: oneDNN's fused LSTM, which autograd would take, has a backward pass that cannot be traced.
        take = _by_transform if tracked or inside_unroll() else _by_autograd

        def objective(leaves: tuple[Tensor, ...]) -> tuple[Tensor, losses.Totals]:
            # Its own containers: what a loss puts into a dict of the batch stays there.
            rows = rows_of.built(batch_leaves)
            totals = losses.total(self.loss, self.uses, mine.whole(leaves), rows, size, carry, keys)
            if finish:
                checked_weight(totals.weight)
                return totals.loss / totals.weight.to(totals.loss.dtype), totals
            return totals.loss, totals

        before = _versions(flat), _versions(given)
        grads, totals = take(objective, tuple(mine.leaves))
        if before != (_versions(flat), _versions(given)):
            raise LossError(_IN_PLACE if before[0] != _versions(flat) else _BATCH_IN_PLACE)
        total = Gradient(tree.unflatten(mine.spec, grads), totals.loss, totals.weight, totals.carry, totals.aux)
        if not finish:
            return total
        aux = None if total.aux is None else tree.map(lambda leaf: leaf / total.weight.to(leaf.dtype), total.aux)
        return total._replace(loss=total.loss / total.weight.to(total.loss.dtype), aux=aux)

    def explain(self) -> Stage:
        """What the gradient is of, and what it is given."""
        facts: dict[str, str] = {
            "returns": "an unfinished sum: Σ gradients, Σ loss, Σ weight",
            "backward passes": "1",
            "memory for gradients": times_params(1, "" if self.of is None else "at most"),
        }
        if self.of is not None:
            facts["of"] = f"{' and '.join(tree.quoted(_names(self.of)))}; all else in the params is constant"
        if self.uses:
            facts["declares"] = ", ".join(sorted(self.uses))
        if "carry" in self.uses:
            facts["carry"] = "a lane for each example" if self.lanes else "shared by all examples"
        return Stage(f"grad of {explain(self.loss).title}", facts)


def grad(loss: Callable[..., Any], *, lanes: bool = False, of: Names | None = None) -> Grad:
    """The gradient of a per-example loss: Σᵢ wᵢ ∇lossᵢ, with Σᵢ wᵢ lossᵢ and Σᵢ wᵢ beside it.

    `loss(params, batch)` returns per-example losses of any shape `(N, …)`, or `(losses, weights)`, or `Losses`.
    By keyword it may declare `carry` (then it returns `(losses, carry)`) and `key`. See `Grad` for the result.

    - `lanes`: what kind of carry it is: one lane for each example, leaves `(N, …)` (recurrent state), which is cut with the
      batch; or, by default, shared by all examples (batch norm's buffers). It matters where `parallel` cuts batches;
    - `of`: the entry of the params that the gradient is of: a key of the dict, or a dotted path as `ft.named_params` prints
      it, inner nodes included. All else in the params is a constant, through which there is no backward pass. The loss gets
      the params whole; `grads` has the structure of the entry. Of a tuple of names: a dict by name. A name that is no entry
      of the params is a `TreeError` that lists those there are.

    >>> def loss(params, batch):
    ...     return (batch["x"] @ params["w"] - batch["y"]) ** 2
    >>> batch = {"x": torch.ones(4, 2), "y": torch.zeros(4)}
    >>> g = grad(loss)({"w": torch.ones(2)}, batch)
    >>> g.grads, g.loss, g.weight.item()
    ({'w': tensor([16., 16.])}, tensor(16.), 4.0)
    >>> game = grad(lambda params, batch: batch * params["x"] * params["y"], of="x")
    >>> game({"x": torch.tensor(2.0), "y": torch.tensor(3.0)}, torch.ones(1)).grads
    tensor(3.)
    """
    return Grad(loss, lanes, of)


def remade(grad: Any, heart: Callable[[Grad], Any], otherwise: str) -> Any:
    """`grad` with another gradient in place of the `ft.grad(loss)` that it is made of, its combinators as they were.

    Raises `ArgumentError` for a gradient that is made of none, which says what to do `otherwise`.
    """
    if isinstance(grad, Grad):
        return heart(grad)
    if not hasattr(grad, "grad"):
        raise ArgumentError(f"{explain(grad).title} is not made of ft.grad(loss), it has no attribute `grad`: {otherwise}")
    mine = copy.copy(grad)
    mine.grad = remade(grad.grad, heart, otherwise)
    return mine


def of_entry(grad: Any, of: Names) -> Any:
    """`grad` as the gradient of an entry of the params, unless it is that of one already: `ft.grad(loss, of=…)` at its heart.

    Raises `ArgumentError` for a gradient that is not made of `ft.grad`.
    """
    # Plans, reducers and what is declared are the same for an entry as for the whole.
    named = which(grad) is not None
    advice = "its attribute `of` has to name the entry that it is of"
    return grad if named else remade(grad, lambda heart: Grad(heart.loss, heart.lanes, of), advice)


def entry_of(grad: Any, params: Tree) -> Entry:
    """What of `params` a gradient is of, whatever combinators are around it."""
    return entry(params, which(grad))


def which(grad: Any) -> Names | None:
    """The name of the entry that a gradient is of, or None for all of the params."""
    while getattr(grad, "of", None) is None and hasattr(grad, "grad"):
        grad = grad.grad
    of: Names | None = getattr(grad, "of", None)
    return of


def _names(of: Names) -> tuple[str, ...]:
    return (of,) if isinstance(of, str) else of


def checked_size(batch: Tree, leaves: list[Any] | None = None) -> int:
    """The size N ≥ 1 of a batch; `TreeError` when it is empty or its leaves disagree."""
    size = tree.common_size(tree.leaves(batch) if leaves is None else leaves, batch)
    if size == 0:
        raise TreeError("the batch is empty (N = 0): a gradient needs at least one example")
    return size


def check_params(params: Entry) -> None:
    """Raise where no gradient can be taken: no params, ones that are not floating, or inside `torch.inference_mode`."""
    if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in params.leaves):
        raise TreeError(_not_floating(params.value))
    if not params.leaves:
        raise TreeError("params are an empty tree: there is nothing to take a gradient of")
    check_mode()


def check_mode() -> None:
    """Raise `ArgumentError` inside `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError("inside torch.inference_mode there are no gradients: leave it, or use torch.no_grad")


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _tracked(leaves: list[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


_IN_PLACE = "the loss changes its params in place: a loss is a pure function, so work on a copy (params['w'] * 2, not .mul_(2))"
_BATCH_IN_PLACE = "the loss changes its batch, carry or key in place, which are the caller's: use copies (x + 1, not x.add_(1))"
Objective = Callable[[tuple[Tensor, ...]], tuple[Tensor, losses.Totals]]


def _called(objective: Objective, leaves: tuple[Tensor, ...]) -> tuple[Tensor, losses.Totals]:
    try:
        return objective(leaves)
    except RuntimeError as error:
        if "leaf Variable" not in str(error):
            raise
        raise LossError(_IN_PLACE) from error


def _by_autograd(objective: Objective, flat: tuple[Tensor, ...]) -> tuple[list[Tensor], losses.Totals]:
    with torch.enable_grad():
        leaves = tuple(leaf.detach().requires_grad_() for leaf in flat)
        versions = [leaf._version for leaf in leaves]
        value, totals = _called(objective, leaves)
        if versions != [leaf._version for leaf in leaves]:
            raise LossError(_IN_PLACE)
        if not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in flat], totals
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    taken = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, flat)]
    carry = None if totals.carry is None else tree.map(Tensor.detach, totals.carry)
    return taken, totals._replace(loss=totals.loss.detach(), carry=carry)


def _by_transform(objective: Objective, flat: tuple[Tensor, ...]) -> tuple[list[Tensor], losses.Totals]:
    # torch.func knows torch's own tree registry alone: what crosses it are flat tuples of tensors.
    spec = None

    def flattened(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        nonlocal spec
        value, totals = _called(objective, leaves)
        rest, spec = tree.flatten(totals)
        return value, tuple(rest)

    grads, (_, rest) = torch.func.grad_and_value(flattened, has_aux=True)(flat)
    assert spec is not None
    return list(grads), tree.unflatten(spec, rest)


def _not_floating(params: Tree) -> str:
    kinds = {path: getattr(leaf, "dtype", None) or type(leaf).__name__ for path, leaf in tree.named(params).items()}
    wrong = [f"{path!r} is {kind}" for path, kind in kinds.items() if not getattr(kind, "is_floating_point", False)]
    return f"gradients are defined for floating params; {', '.join(wrong)}: keep such tensors in the carry or the batch"


def summed(grad: Any, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
    """What `grad` gives, as sums over examples, whatever its own reducer is: what another reducer can go on with.

    A linear reducer's unfinished result is such a sum; any other's is finished, and counted with its weight.
    """
    if grad.reduce.linear:
        return grad(params, batch, carry=carry, key=key)
    done: Gradient = grad.finished(params, batch, carry=carry, key=key)
    grads, loss, aux = tree.map(lambda leaf: leaf * done.weight.to(leaf.dtype), (done.grads, done.loss, done.aux))
    return done._replace(grads=grads, loss=loss, aux=aux)


def as_gradient(value: Any) -> Any:
    """`value` when it is a gradient (has `finished` and `reduce`); else an `ArgumentError` that says how to get one."""
    if not (callable(value) and hasattr(value, "finished") and hasattr(value, "reduce")):
        raise ArgumentError(f"expected a gradient, got {explain(value).title}: write ft.grad(loss)")
    return value
