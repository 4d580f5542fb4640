"""Mixed precision: which dtype params are kept in, a loss is computed in, and its results are given in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from functrain.core import loss as losses
from functrain.core import tree
from functrain.core.entries import Names, check_names, entry
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.loss import Losses
from functrain.core.tree import Tree

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Precision:
    """The dtypes of a program: of its params, of what it computes, and of what comes out.

    It has a text form, for configs: `Precision.of("compute=float16")`; what is left out is as by default, and `str(policy)`
    has all three. Raises `ArgumentError` for a dtype that is not float16, bfloat16, float32 or float64.

    Source: jmp, "Mixed precision training in JAX" (DeepMind), after Micikevicius et al., "Mixed precision training", ICLR 2018.

    >>> str(Precision(compute=torch.float16)), Precision.of("compute=float16") == Precision(compute=torch.float16)
    ('params=float32,compute=float16,output=float32', True)
    """

    params: torch.dtype = torch.float32
    compute: torch.dtype = torch.bfloat16
    output: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for one in fields(self):
            if (dtype := getattr(self, one.name)) not in _DTYPES.values():
                raise ArgumentError(f"{one.name} must be one of torch.{', torch.'.join(_DTYPES)}, got {dtype!r}")

    @classmethod
    def of(cls, policy: Precision | str) -> Precision:
        """A policy, as it is or from its text."""
        if isinstance(policy, Precision):
            return policy
        names = [one.name for one in fields(cls)]
        expected = f"expected text such as {str(cls())!r}, of dtypes {', '.join(_DTYPES)}"
        if not isinstance(policy, str):
            raise ArgumentError(f"a policy is an ft.Precision or its text, got {policy!r}: {expected}")
        found: dict[str, torch.dtype] = {}
        for part in policy.split(","):
            name, _, kind = (text.strip() for text in part.partition("="))
            if name not in names or name in found or kind not in _DTYPES:
                raise ArgumentError(f"the policy {policy!r} has the part {part!r}: {expected}")
            found[name] = _DTYPES[kind]
        return cls(**found)

    def __str__(self) -> str:
        return ",".join(f"{one.name}={str(getattr(self, one.name)).removeprefix('torch.')}" for one in fields(self))

    def cast_params(self, values: Tree) -> Tree:
        """The floating leaves of a tree in the params' dtype: `step.init(policy.cast_params(params))`.

        >>> Precision(params=torch.float64).cast_params({"w": torch.ones(1), "count": torch.tensor(1)})
        {'w': tensor([1.], dtype=torch.float64), 'count': tensor(1)}
        """
        return _cast(values, self.params)

    def cast_compute(self, values: Tree) -> Tree:
        """The floating leaves of a tree in the dtype that is computed in."""
        return _cast(values, self.compute)

    def cast_output(self, values: Tree) -> Tree:
        """The floating leaves of a tree in the dtype of what comes out."""
        return _cast(values, self.output)


def _cast(values: Tree, dtype: torch.dtype) -> Tree:
    return tree.map(lambda leaf: leaf.to(dtype) if _floating(leaf) else leaf, values)


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def mixed(loss: Callable[..., Any], policy: Precision | str = Precision(), *, keep: Names = ()) -> Mixed:
    """The same loss, computed in the policy's `compute` dtype.

    The floating leaves of params and batch are cast on the way in, inside of what is differentiated, so that gradients come
    back in the params' own dtype; losses, weights and aux are cast to `output` on the way out, and are summed there. Integers,
    bools and keys are never cast. Params in half precision themselves (`policy.params`) lose small updates to rounding:
    keep them in float32 unless memory forbids.

    - `keep`: entries of the batch, by name, that stay as they are: weights, or the targets of a regression, which 8 bits
      (bfloat16) or a largest number of 65504 (float16) would change;
    - a carry comes in and goes out in its own dtypes. Batch norm's statistics stay float32 that way (modules of
      `ft.functional` take half inputs beside them); a recurrent state that is computed with begins in `policy.compute`;
    - what is delicate can be cast back inside the loss: `F.cross_entropy(scores.to(policy.output), …)`.

    It declares what the loss declares, so it goes wherever the loss does: every plan, `ft.evaluate`, `ft.tbptt`, compiled.
    With float16, whose gradients underflow, train with `ft.loss_scaled(step)`.

    Raises `ArgumentError` for what is no policy, `TreeError` where `keep` names no entry of a batch.

    >>> import functrain as ft
    >>> half = mixed(lambda params, batch: batch * params, "compute=bfloat16")
    >>> taken = ft.grad(half).finished(torch.tensor(1.0), torch.tensor([1.0, 1.001]))
    >>> taken.grads, taken.loss
    (tensor(1.), tensor(1.))
    """
    if hasattr(loss, "finished"):
        raise ArgumentError(f"mixed takes a loss, got {explain(loss).title}: write ft.grad(ft.mixed(loss, policy))")
    return Mixed(loss, Precision.of(policy), keep)


class Mixed:
    """A loss under a policy: what `mixed` returns; called like the loss."""

    def __init__(self, loss: Callable[..., Any], policy: Precision, keep: Names = ()) -> None:
        self.loss, self.policy, self.keep = loss, policy, keep
        self.carries = "carry" in losses.declared(loss)
        if keep != ():
            check_names(keep)
        # The signature is the declaration: it declares what the loss does.
        self.__signature__ = inspect.signature(loss)

    def __call__(self, params: Tree, batch: Tree, **given: Any) -> Losses:
        try:
            output = self.loss(self.policy.cast_compute(params), self._rows(batch), **given)
        except RuntimeError as error:
            if any(text in str(error) for text in ("dtype", "scalar type")):
                error.add_note(
                    f"under ft.mixed params and batch are {self.policy.compute}, and a carry or what the loss closes over is "
                    "as it was: begin a recurrent state in the policy's compute dtype, and cast constants inside the loss"
                )
            raise
        taken = losses.normalised(output, self.carries)
        values, weights, aux = self.policy.cast_output((taken.losses, taken.weights, taken.aux))
        return Losses(values, weights, aux, _as_before(given.get("carry"), taken.carry))

    def explain(self) -> Stage:
        """The loss inside, and the policy."""
        return Stage(f"mixed({explain(self.loss).title}, {self.policy})")

    def _rows(self, batch: Tree) -> Tree:
        cast = self.policy.cast_compute(batch)
        if self.keep == ():
            return cast
        try:
            return entry(cast, self.keep).whole(entry(batch, self.keep).leaves)
        except TreeError as error:
            raise TreeError(f"keep={self.keep!r} of ft.mixed is to name entries of the batch: {error}") from error


def _as_before(before: Tree, after: Tree) -> Tree:
    """A carry in the dtypes that it came in, as far as it is still made of the same leaves."""
    if before is None or not tree.same_structure(before, after):
        return after
    return tree.map(lambda leaf, was: leaf.to(was.dtype) if _floating(leaf) and _floating(was) else leaf, after, before)
