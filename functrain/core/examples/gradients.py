"""Gradients of single examples by the fastest way that fits the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.deferred import drawn
from functrain.core.errors import ArgumentError, FunctrainError, LossError, TreeError
from functrain.core.examples import recorded, reference
from functrain.core.examples.batch import Examples
from functrain.core.examples.reference import Scale
from functrain.core.grad import Grad, as_gradient, check_params, checked_size, entry_of
from functrain.core.loss import missing
from functrain.core.reduce.base import Gradient
from functrain.core.transforms import inside_transform
from functrain.core.tree import Tree

BUDGET = 256 * 2**20
Result = TypeVar("Result")


def example_grads(
    grad: Any, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None, budget: int | None = None
) -> Gradient:
    """The gradient of each example by itself: grads, loss, weight and aux with leaves `(N, …)`, each of a batch of one.

    The loss is run once, on all examples apart from each other, and there is one backward pass for all of them, down to the
    outputs of layers. From these and the layers' inputs each example's gradient follows: by a product for matrices, over
    windows for convolutions, by sums for biases and norms' scales; any other use of a leaf is given a copy of it (without
    memory) for each example, and autograd tells them apart. `plan_of` says which it is for each leaf. A loss that
    cannot be run so is mapped by torch.func.vmap over its gradient; one that cannot be mapped (nn.LSTM, losses that
    read values) is taken one example after the other. The results are the same, up to rounding.

    - `budget`: bytes that gradients of single examples may take at once, beside the result (at least one); default 256 MiB;
    - `carry`: lanes `(N, …)`, for `ft.grad(loss, lanes=True)`; `key`: 0-d, or `(N,)`, one for each example.

    On one thread a CNN (1, 16 and 32 channels, 28 × 28, batch 128) takes 0.8 of the time of the batch's own gradient (images
    run with channels last, which the batch's gradient does not), where vmap over the gradient takes from 1.1 to 10, as
    processors differ; an MLP (64-128-128-10, batch 128) 2.2, and 4.2 by vmap.

    Raises `LossError` where the examples share buffers (batch norm), or the loss breaks its contract; `TreeError` for a batch
    that is not tensors `(N, …)`. An error of the loss is raised as it is.

    >>> import functrain as ft
    >>> grad = ft.grad(lambda params, batch: (batch["x"] @ params["w"] - batch["y"]) ** 2)
    >>> params, batch = {"w": torch.ones(2)}, {"x": torch.tensor([[1.0, 0.0], [2.0, 1.0]]), "y": torch.zeros(2)}
    >>> example_grads(grad, params, batch).grads["w"]
    tensor([[ 2.,  0.],
            [12.,  6.]])
    """
    examples, bytes = _examples(grad, params, batch, carry, key), checked_budget(budget)
    fast = partial(recorded.rows, examples, bytes)
    return _first(examples, fast, lambda one: reference.rows(examples, bytes, one))


def scaled_sum(
    grad: Any,
    params: Tree,
    batch: Tree,
    *,
    scale: Scale,
    carry: Tree = None,
    key: Tensor | None = None,
    budget: int | None = None,
) -> Gradient:
    """Σᵢ s(‖gᵢ‖) gᵢ over the examples of a batch, with Σ loss, Σ weight and Σ aux beside it.

    What clipping each example's gradient needs, s(n) = min(1, c / n), without a second backward pass ("book-keeping", Bu et
    al. 2022) and, where algebra can do without, without the gradients of the examples: ‖gᵢ‖ = ‖δᵢ‖ ‖xᵢ‖ for a matrix at one
    position, pairs of positions where these are few (Goodfellow 2015, Li et al. 2021), windows for convolutions (Rochette et
    al. 2019); see `Linear`, `Convolution` and `Embedding` in this package, `example_grads` for any other layer, and `plan_of`.

    - `scale(norms (N,)) -> (N,)`, element by element, float32 or float64: the norms are those of each example's gradient over
      all leaves together. Where the budget cuts the batch, it is called for each part;
    - `budget`, `carry`, `key`, and what it raises: as for `example_grads`.

    The result agrees with the gradients taken one by one to 1e-6 (float32). Times of the batch's own gradient, on one thread:
    MLP 784-1024-1024-10, batch 512: 1.1; MLP 64-128-128-10, batch 128: 2.1 (compiled, the steps: 1.3); the CNN of
    `example_grads`: 0.7.

    Sources: Bu et al., "Differentially private optimization on large model at small cost", arXiv 2210.00038, and
    those named by the layers.

    >>> import functrain as ft
    >>> grad = ft.grad(lambda params, batch: (batch["x"] @ params["w"] - batch["y"]) ** 2)
    >>> params, batch = {"w": torch.ones(2)}, {"x": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "y": torch.zeros(2)}
    >>> scaled_sum(grad, params, batch, scale=lambda norms: 1 / norms).grads["w"]
    tensor([1.6000, 0.8000])
    """
    examples, bytes = _examples(grad, params, batch, carry, key), checked_budget(budget)
    fast = partial(recorded.scaled, examples, scale, bytes)
    return _first(examples, fast, lambda one: reference.scaled(examples, scale, bytes, one))


def plan_of(grad: Any, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> dict[str, str]:
    """How the gradients of single examples are found, for each leaf of params by name, in words: by a run of the first example.

    >>> import functrain as ft
    >>> grad = ft.grad(lambda params, batch: torch.tanh(batch @ params["w"]) * params["scale"])
    >>> plan = plan_of(grad, {"w": torch.ones(3, 2), "scale": torch.tensor(2.0)}, torch.ones(4, 3))
    >>> print(*(f"{name} = {how}" for name, how in plan.items()), sep="\\n")
    scale = expanded: a gradient for each example, by autograd
    w = linear: norms from activations and output gradients
    """
    paths = tree.paths(entry_of(grad, params).value)
    one = next(_examples(grad, params, batch, carry, key).parts(1))
    return dict(zip(paths, _first(one, partial(recorded.algebra, one), partial(_as_a_whole, one))))


_WHOLE: dict[reference.Rows, str] = {
    reference.by_vmap: "all leaves: a gradient for each example, by vmap over the gradient",
    reference.by_loop: "all leaves: a gradient for each example, one after the other",
}


def _as_a_whole(examples: Examples, way: reference.Rows) -> list[str]:
    way(examples)
    return [_WHOLE[way]] * len(entry_of(examples.grad, examples.params).leaves)


def _examples(grad: Any, params: Tree, batch: Tree, carry: Tree, key: Tensor | None) -> Examples:
    check_lanes(as_gradient(grad))
    check_params(entry_of(grad, params))
    batch = drawn(batch)
    size = checked_size(batch)
    if not all(isinstance(leaf, Tensor) for leaf in tree.leaves(batch)):
        kinds = ", ".join(f"{path or 'the batch'} is {type(leaf).__name__}" for path, leaf in tree.named(batch).items())
        raise TreeError(f"examples are taken out of batches of tensors, {kinds}: see torch.as_tensor")
    missing(grad.uses, carry, key)
    keys = random.example_keys(key, size) if key is not None and "key" in grad.uses else None
    return Examples(grad, params, batch, carry, keys, size)


def _first(examples: Examples, fast: Callable[[], Result], slow: Callable[[reference.Rows], Result]) -> Result:
    """The result by the first way that can take this loss: recorded, mapped, or one example after the other.

    An error of the loss itself is an error in every way: the last one, which is plain autograd, raises it as it is.
    """
    ways: list[Callable[[], Result]] = [partial(slow, reference.by_vmap)]
    for way in [fast, *ways] if _recordable(examples) else ways:
        try:
            return way()
        except FunctrainError:
            raise
        except (RuntimeError, TypeError, UserWarning) as error:
            if any(text in str(error) for text in _MEMORY):
                raise
            if "in-place" in str(error):
                # Mapped over the gradient, the loss would write into the caller's params before anybody could say so.
                break
    return slow(reference.by_loop)


# Out of memory, whoever called has to cut the batch; another way would take as much.
_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def _recordable(examples: Examples) -> bool:
    if type(examples.grad) is not Grad or inside_transform() or torch.compiler.is_dynamo_compiling():
        return False
    tracked = (examples.params, examples.batch, examples.carry) if torch.is_grad_enabled() else ()
    return not any(leaf.requires_grad for leaf in tree.leaves(tracked))


def checked_budget(budget: int | None) -> int:
    """`budget`, or the default for None; `ArgumentError` for anything but a number of bytes of at least 1."""
    if budget is None:
        return BUDGET
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ArgumentError(f"budget must be a number of bytes of at least 1, got {budget!r}")
    return budget


def check_lanes(grad: Any) -> None:
    """Raise `LossError` where the gradient of one example is not defined: the loss threads buffers that all examples share."""
    if "carry" in grad.uses and not grad.lanes:
        raise LossError(
            "the loss threads buffers that all examples of a batch share (batch norm), so no example has a gradient of its "
            "own: use a norm of single examples (nn.GroupNorm, nn.LayerNorm), or say ft.grad(loss, lanes=True) where the "
            "carry has a lane for each example"
        )
