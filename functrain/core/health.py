"""The health of trees of numbers: what in them is not finite, and how large the rest is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError, LossError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.grad import Grad, as_gradient
from functrain.core.reduce.base import Gradient, Reducer, visible
from functrain.core.transforms import inside_tracing, inside_transform
from functrain.core.tree import Tree

Nonfinite = Literal["report", "raise"]


class Health(NamedTuple):
    """What can be said of a tensor's numbers, each 0-d: those that are not finite counted, the others measured.

    - `nan`, `inf`: how many elements are NaN, and how many are infinite: int64;
    - `norm`, `max`: ‖x‖₂ and max |x| over the finite elements, 0 where there are none: float64.
    """

    nan: Tensor
    inf: Tensor
    norm: Tensor
    max: Tensor


def health(values: Tree) -> dict[str, Health]:
    """The health of every leaf of a tree of tensors (params, gradients, a state) by its dotted path.

    Elements of any number dtype: complex ones count as NaN where a part is, and are measured by |z|. Nothing overflows on the
    way: float64 leaves are scaled by their maximum. It is tensor arithmetic, so it works under vmap and inside a graph.

    Raises `TreeError` for leaves that are not tensors.

    >>> health({"w": torch.tensor([3.0, float("nan"), -4.0])})["w"]
    Health(nan=tensor(1), inf=tensor(0), norm=tensor(5., dtype=torch.float64), max=tensor(4., dtype=torch.float64))
    """
    named = tree.named(values)
    for path, leaf in named.items():
        if not isinstance(leaf, Tensor):
            raise TreeError(f"leaf {path!r} is {type(leaf).__name__}: health is that of trees of tensors")
    return {path: _health(leaf.detach()) for path, leaf in named.items()}


def _health(leaf: Tensor) -> Health:
    # In the double precision that the sizes are told in: the |z| of finite complex64 may be beyond float32.
    flat = (leaf.to(torch.complex128).abs() if leaf.is_complex() else leaf.double()).reshape(-1)
    none = torch.zeros((), dtype=torch.int64, device=leaf.device)
    if not flat.numel():
        return Health(none, none, none.double(), none.double())
    if visible(leaf) and all_finite([leaf]):
        return Health(none, none, *_size(flat, leaf.itemsize))
    # A complex infinity may have a NaN beside it, whose |z| is infinite all the same.
    nan = (leaf if leaf.is_complex() else flat).reshape(-1).isnan()
    inf = flat.isinf() & ~nan
    clean = torch.where(flat.isfinite(), flat, torch.zeros_like(flat))
    return Health(nan.sum(), inf.sum(), *_size(clean, leaf.itemsize))


def _size(flat: Tensor, itemsize: int) -> tuple[Tensor, Tensor]:
    """‖x‖ and max |x| of finite float64 numbers `(n,)` that had `itemsize` bytes each before."""
    low, high = torch.aminmax(flat)
    largest = torch.maximum(-low, high)
    if itemsize < 8:
        return torch.dot(flat, flat).sqrt(), largest
    # Squares of float64 leave its range from 10¹⁵⁴ on, and below 10⁻¹⁶².
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = flat / unit
    return unit * torch.dot(scaled, scaled).sqrt(), largest


# --- is it finite? -------------------------------------------------------------------------------------------------


def all_finite(leaves: Iterable[Tensor]) -> Tensor:
    """Whether every number in `leaves` is finite: 0-d bool.

    >>> all_finite([torch.ones(2), torch.arange(3)]), all_finite([torch.ones(2), torch.tensor([0.0, -torch.inf])])
    (tensor(True), tensor(False))
    """
    real = [_real(leaf.detach()) for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
    if not real:
        return torch.tensor(True)
    if inside_tracing():
        return torch.stack([(leaf.abs() < torch.inf).all() for leaf in real]).all()
    # The minimum and maximum pass NaN on, and of 10⁶ float32 take 0.3 ms, where `isfinite().all()` takes 9.6. In a graph it is
    # the other way round: there comparing adds 0.1 ms to a small step, and these 0.4.
    ends = [end for leaf in real if leaf.numel() for end in (torch.aminmax(leaf) if leaf.ndim else (leaf,))]
    return torch.stack([end.double() for end in ends]).isfinite().all() if ends else torch.tensor(True)


def _real(leaf: Tensor) -> Tensor:
    leaf = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
    # Numbers of one byte have no arithmetic.
    return leaf.float() if leaf.itemsize == 1 else leaf


def counted(named: dict[str, Tensor]) -> list[tuple[str, str]]:
    """The leaves that are not finite by name, each with its counts in words: the first five of them."""
    sick = [(path, leaf, _health(leaf.detach())) for path, leaf in named.items() if not all_finite([leaf])]
    return [
        (path, f"{int(found.nan)} NaN and {int(found.inf)} infinite of {leaf.numel()} numbers, shape {tuple(leaf.shape)}")
        for path, leaf, found in sick[:5]
    ]


# --- gradients -----------------------------------------------------------------------------------------------------


def monitor(grad: Any, *, paths: bool = False, nonfinite: Nonfinite = "report") -> Monitor:
    """`grad` with the health of its finished gradient among the measures of a step: the gradient itself has the same bits.

    The metrics of `ft.step(ft.monitor(grad), optimizer)` have `gradient.norm` and `gradient.max` (over all leaves and finite
    elements), `gradient.nan` and `gradient.inf` (how many elements), 0-d float64 each; with `paths` also those of each leaf,
    `gradient.norm.hidden.w` and so on. What the loss measures (`aux`) keeps its names, where it is a dict or one tensor.

    - `nonfinite="raise"`: a gradient with NaN or infinities is a `LossError` that names the leaves. It looks at values (on a
      GPU it waits for them), so not inside `ft.compiled`, `ft.population` or the plan `vmap`: that is an `ArgumentError`.

    Around a gradient that another combinator adds up (`ft.parallel(ft.monitor(ft.grad(loss)), 8)`), there is no finished
    gradient to measure; but "raise" looks at each part, and the error says which.

    Raises `LossError` where `aux` has one of the names already.

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch - params["mean"]) ** 2
    >>> train = ft.step(ft.monitor(ft.grad(loss)), ft.optim.sgd(0.1))
    >>> state, metrics = train(train.init({"mean": torch.tensor(0.0)}), torch.ones(3))
    >>> metrics["gradient.norm"], metrics["gradient.nan"]
    (tensor(2., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    if nonfinite not in get_args(Nonfinite):
        raise ArgumentError(f"nonfinite must be 'report' or 'raise', got {nonfinite!r}")
    return Monitor(as_gradient(grad), bool(paths), nonfinite)


class Monitor:
    """What `monitor` returns; called like any gradient: `(params, batch, *, carry=None, key=None)`."""

    def __init__(self, grad: Any, paths: bool, nonfinite: Nonfinite) -> None:
        self.grad, self.paths, self.nonfinite = grad, paths, nonfinite
        self.uses, self.lanes = grad.uses, grad.lanes
        # An equal reducer, but another: `parallel` asks for nothing finished of a gradient whose reducer it does not know, so
        # that which measures there are does not depend on its plan.
        self.reduce: Reducer = dataclasses.replace(grad.reduce)
        self.whole = isinstance(grad, Grad) or getattr(grad, "whole", False)

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Any:
        taken = self.grad(params, batch, carry=carry, key=key)
        if isinstance(taken, Gradient):
            self._check(taken.grads)
        return taken

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        """The finished gradient, with its health in `aux`."""
        taken: Gradient = self.grad.finished(params, batch, carry=carry, key=key)
        self._check(taken.grads)
        return taken._replace(aux=_extended(taken.aux, _measures(taken, self.paths)))

    def explain(self) -> Stage:
        """What is measured, what happens where it is not finite, and the gradient inside."""
        facts = {
            "measures": "gradient.norm, .max, .nan, .inf" + (", and those of each leaf" if self.paths else ""),
            "not finite": "an error" if self.nonfinite == "raise" else "counted",
        }
        return Stage("monitor", facts, [explain(self.grad)])

    def _check(self, grads: Tree) -> None:
        if self.nonfinite != "raise":
            return
        if inside_transform() or inside_tracing():
            raise ArgumentError(
                "monitor(nonfinite='raise') looks at values, and inside a compiled step, a population, the plan vmap or any "
                "other transform there are none to look at: take nonfinite='report' there, or ft.guard(step)"
            )
        rows = counted(tree.named(grads)) if not all_finite(tree.leaves(grads)) else []
        if rows:
            where = "; ".join(f"at {path!r} has {counts}" if path else f"has {counts}" for path, counts in rows)
            raise LossError(
                f"the gradient {where}: look for a square root, logarithm or division at 0 in the loss, for overflow in exp or "
                "in a low precision, and at the batch itself; ft.guard(step) would skip such a batch"
            )


def _measures(taken: Gradient, paths: bool) -> dict[str, Tensor]:
    each = health(taken.grads)
    zero = taken.weight.new_zeros((), dtype=torch.float64)
    columns = [torch.stack([column.double() for column in columns]) for columns in zip(*each.values())] or [zero.reshape(1)] * 4
    nan, inf, norms, largest = columns
    # Counts as floats: means over parts, windows and epochs are taken of them.
    found = {"nan": nan.sum(), "inf": inf.sum(), "norm": _size(norms, norms.itemsize)[0], "max": largest.amax()}
    measures = {f"gradient.{name}": found[name] for name in ("norm", "max", "nan", "inf")}
    if paths:
        for name in ("norm", "max", "nan", "inf"):
            measures |= {f"gradient.{name}.{path}": getattr(one, name).double() for path, one in each.items() if path}
    return measures


def _extended(aux: Tree, measures: dict[str, Tensor]) -> dict[str, Any]:
    """`aux` with `measures` beside what it has; `LossError` where a name is taken."""
    known = {} if aux is None else aux if isinstance(aux, dict) else {"aux": aux}
    both = sorted(set(tree.paths(known)) & set(measures))
    if both:
        raise LossError(
            f"the aux measures of the loss have {', '.join(tree.quoted(both[:3]))} already, which monitor measures: give them "
            "another name; and one monitor around a gradient is enough"
        )
    return {**known, **measures}
