"""What every reducer is made of: the gradient as a value, the monoid over gradients, and the sums that most reducers keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.errors import ArgumentError, LossError
from functrain.core.explain import Stage
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree


class Gradient(NamedTuple):
    """A gradient and what came with it.

    Unfinished, as gradients give it and reducers merge it: sums over examples. Finished: what the optimizer gets.

    - `grads`: like params: Σ wᵢ ∇lossᵢ;
    - `loss`: 0-d: Σ wᵢ lossᵢ;
    - `weight`: 0-d, float64: Σ wᵢ (the number of losses when there are no weights); kept when finished;
    - `carry`: for the next call, or None;
    - `aux`: a tree of 0-d tensors: Σ wᵢ auxᵢ.
    """

    grads: Tree
    loss: Tensor
    weight: Tensor
    carry: Tree = None
    aux: Tree = None


@dataclass(frozen=True)
class Reducer:
    """A monoid over unfinished gradients: `lift` each part's, `merge` two (associatively), `finish` once.

    The carry is not the reducer's business: `merge` drops it, and `parallel` threads it.

    - `linear`: merging adds, so that parts may as well be summed before the gradient is taken;
    - `scale`: the unit is not a part but an example: the sum is Σᵢ s(‖gᵢ‖) gᵢ with `scale(norms (N,)) -> (N,)`, and its
      gradients are never all alive at once. `merge` then adds;
    - `keyed`: it draws random numbers: `finish(total, key)`;
    - `copies`: how many trees like params one lifted gradient holds, and `gathers`: whether merging keeps all of them
      (order statistics have to see every part); both for `explain`;
    - `least`: the fewest parts that it can tell anything from.

    A reducer of one's own takes a few lines, here the part with the largest loss:

    >>> def larger(a, b):
    ...     return tree.map(lambda x, y: torch.where(a.loss >= b.loss, x, y), a, b)
    >>> worst = Reducer("worst", merge=larger, finish=mean_of)
    """

    name: str
    merge: Callable[[Any, Any], Any]
    finish: Callable[..., Gradient]
    lift: Callable[[Gradient], Any] = lambda gradient: gradient
    linear: bool = False
    scale: Callable[[Tensor], Tensor] | None = None
    keyed: bool = False
    copies: int = 1
    gathers: bool = False
    least: int = 1

    def __post_init__(self) -> None:
        wrong = [name for name in ("merge", "finish", "lift") if not callable(getattr(self, name))]
        if wrong or not isinstance(self.name, str):
            what = f"{wrong[0]} is {getattr(self, wrong[0])!r}" if wrong else f"name is {self.name!r}"
            raise ArgumentError(f"a Reducer has a name and functions merge, finish and lift; {what}")

    def __repr__(self) -> str:
        return f"reduce.{self.name}"

    def explain(self) -> Stage:
        """What the reducer needs."""
        sees = "sums alone: parts may be fused" if self.linear else "every part's gradient, kept to the end"
        if self.scale is not None:
            sees = "the norm of each example's gradient"
        elif not self.linear and not self.gathers:
            sees = "each part's gradient, merged as it comes"
        facts = {"sees": sees, "randomness": "drawn once, keyed" if self.keyed else "none"}
        if self.least > 1:
            facts["parts"] = f"at least {self.least}"
        return Stage(repr(self), facts)

    def finished(self, total: Any, key: Tensor | None) -> Gradient:
        """`finish`, given a key of its own when the reducer draws random numbers."""
        return self.finish(total, own_key(key)) if self.keyed else self.finish(total)


# What a reducer draws is apart from what a loss draws of the same key.
_REDUCERS = 0x3C6EF372FE94F82B


def own_key(key: Tensor | None) -> Tensor:
    """The 0-d key of a reducer, of a batch's key `()`, or of its examples' keys `(N,)`."""
    if key is None:
        raise LossError("the reducer draws random numbers and no key was given: pass key=ft.random.key(seed); a step does so")
    return random.fold_in(key if key.ndim == 0 else key[0], _REDUCERS)


def add(left: Tree | None, right: Tree | None) -> Tree | None:
    """The sum of two trees of tensors; `None` is nothing: None + g = g. Neither is changed.

    >>> add(None, {"w": torch.ones(1)})
    {'w': tensor([1.])}
    """
    if left is None or right is None:
        return right if left is None else left
    if isinstance(left, Tensor):
        return left + right
    if isinstance(left, Gradient) and isinstance(right, Gradient):
        grads, loss, weight, _, aux = (add(a, b) for a, b in zip(left, right._replace(carry=None)))
        return Gradient(grads, loss, weight, None, aux)  # type: ignore[arg-type]
    return tree.map(torch.add, left, right)


def visible(value: Tensor) -> bool:
    """Whether a number can be looked at here: not inside a transform or a trace, and without waiting for a device."""
    return value.is_cpu and not inside_transform() and not inside_tracing()


def checked_weight(weight: Tensor) -> None:
    """Raise `LossError` where the mean over nothing is asked for, as far as that can be seen without waiting for a device."""
    if not visible(weight):
        return
    value = weight.item()
    if value < 0:
        raise LossError("the weights of this batch have negative ones among them: weights are numbers of at least 0")
    if not value:
        raise LossError("the weights of this batch sum to zero: there is nothing to take the mean of; leave such batches out")


def divided(values: Tree, by: Tensor) -> Tree:
    """Each leaf divided by the 0-d `by`; at least in float32, and given in the leaf's own dtype."""

    def one(leaf: Tensor) -> Tensor:
        # bfloat16 knows no weight of 257, and float16 none above 65504.
        wide = torch.promote_types(leaf.dtype, torch.float32)
        return (leaf.to(wide) / by.to(wide)).to(leaf.dtype)

    return tree.map(one, values)


def mean_of(total: Gradient, check: bool = True) -> Gradient:
    """The finished mean of an unfinished sum: gradients, loss and aux divided by the weight, which must not be zero."""
    if check:
        checked_weight(total.weight)
    grads, loss, aux = divided((total.grads, total.loss, total.aux), total.weight)
    return total._replace(grads=grads, loss=loss, aux=aux)


def squared_norm(grads: Tree) -> Tensor:
    """‖g‖² over all leaves together: 0-d, float64.

    >>> squared_norm({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
    tensor(25., dtype=torch.float64)
    """
    return inner_product(grads, grads)


def inner_product(left: Tree, right: Tree) -> Tensor:
    """⟨a, b⟩ over all leaves together: 0-d, float64."""
    pairs = list(zip(tree.leaves(left), tree.leaves(right)))
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([(a.double() * b.double()).sum() for a, b in pairs]).sum()
