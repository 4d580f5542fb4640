"""Rematerialisation: intermediate values that are computed again for the backward pass instead of being kept for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrain.core import tree
from functrain.core.errors import ArgumentError, LossError
from functrain.core.purity import Unkeyed, closed_over, mapped, plain, tracked, unchanged
from functrain.core.transforms import inside_tracing, inside_transform

Function = TypeVar("Function", bound=Callable[..., Any])
# From tensors to the differentiable ones among the results: what backward passes are made of.
Flat = Callable[..., tuple[Tensor, ...]]


def remat(function: Function) -> Function:
    """The same function, whose intermediate values are not kept for the backward pass but computed again there.

    With L blocks of m bytes of intermediate values each, `remat` around each block keeps the L inputs of the blocks and one
    block's m bytes at a time, in place of L·m; it costs one more forward pass.

    Arguments and results are any trees. What is no tensor is handed through; integer and bool tensors (labels, keys) have no
    gradient. It works, and saves memory, under torch's autograd, under torch.func's grad, vjp and vmap in any order and
    any number of times, and in a compiled step, where the recomputation is tied to the gradient that it waits for (a compiler
    would move it into the forward pass). Under jvp it works, where there is nothing to save.

    Where vmap is inside of grad, the gradient of what it does not map over is taken for each lane before it is summed. A call
    costs a fraction of a millisecond more outside of compiled steps: give it blocks, not single operations. Every floating
    result counts as differentiable, those that the function detached with a gradient of zero. The first call in a process
    takes a second or more: torch loads its transforms.

    The function has to be pure. Params and whatever else gradients are taken of, or that vmap maps over, are arguments; other
    tensors may be closed over. Random numbers come from keys (`ft.random`), so that they are the same both times.

    Raises `LossError`, rather than giving a wrong gradient, where the function depends on a tensor with a gradient (or, under
    vmap, closes over a mapped one) that is no argument, changes an argument in place, or draws from torch's global
    generator (looked for in the first call, and whenever it is traced). `ArgumentError` for what cannot be called.

    Source: Griewank, Walther, "Revolve", TOMS 2000; Chen et al., "Training deep nets with sublinear memory cost", 2016.

    >>> block = remat(lambda w, x: torch.tanh(x @ w))
    >>> loss = lambda w, x: block(w["out"], block(w["in"], x)).square().sum(1)
    >>> import functrain as ft
    >>> w = {"in": torch.eye(2), "out": torch.eye(2)}
    >>> ft.grad(loss)(w, torch.zeros(3, 2)).grads["in"].shape
    torch.Size([2, 2])
    """
    if not callable(function):
        raise ArgumentError(f"remat takes a function, got {type(function).__name__}: write ft.remat(lambda params, x: …)")
    watched = False

    @functools.wraps(function, updated=())
    def rematerialised(*args: Any, **keywords: Any) -> Any:
        nonlocal watched
        leaves, spec = tree.flatten((args, keywords))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        given = [leaves[place] for place in places]
        # Without the tensors: what the backward pass keeps of this call must not keep the graph before it alive.
        frame = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def called(tensors: Sequence[Tensor]) -> tuple[list[Any], Any]:
            filled = list(frame)
            for place, tensor in zip(places, tensors):
                filled[place] = tensor
            positional, named = tree.unflatten(spec, filled)
            return tree.flatten(function(*positional, **named))

        # Constants at every level of differentiation: no graph is built, and a result that is tracked all the same tells
        # of a tensor that is no argument.
        constants = [leaf.detach() for leaf in given]
        with unchanged(given), nullcontext() if watched and not inside_tracing() else Unkeyed():
            outputs, outputs_spec = called(constants)
        watched = True
        own = []
        for place, output in enumerate(outputs):
            same = next((leaf for leaf, constant in zip(given, constants) if output is constant), None)
            if same is not None:
                outputs[place] = same
            elif isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
                own.append(place)
        precision = _Precision(given)

        def again(*tensors: Tensor) -> tuple[Tensor, ...]:
            with precision.restored():
                results, _ = called(tensors)
            return tuple(results[place] for place in own)

        computed = [outputs[place] for place in own]
        if any(map(tracked, computed)):
            raise _refused(function, "depends on a tensor that gradients are taken of", tracked)
        if inside_transform() and any(map(tracked, given)) and any(mapped(tensor) for _, tensor in closed_over(function)):
            raise _refused(function, "closes over a tensor that vmap maps over", mapped)
        for place, output in zip(own, _attached(again, given, computed)):
            outputs[place] = output
        return tree.unflatten(outputs_spec, outputs)

    return cast(Function, rematerialised)


# --- the backward pass -------------------------------------------------------------------------------------------------


def _attached(function: Flat, given: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`outputs`, which `function(*given)` gave without a graph, with the derivatives of `function` attached."""
    recorded = torch.is_grad_enabled() or inside_transform() or forward_ad._current_level >= 0
    if not outputs or not recorded or not any(map(tracked, given)):
        return tuple(outputs)
    return cast(tuple[Tensor, ...], _Attached.apply(function, len(given), *given, *outputs))


def _taken(function: Flat, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # torch.func always records backward passes for the next derivative. This one is rematerialised itself: its record holds
    # what it was given and not, once more, everything in between.
    return _attached(function, given, function(*[leaf.detach() for leaf in given]))


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Flat, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.detach() for output in tensors[size:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, ctx.size, *tensors = inputs
        # A gradient of zero for a result that nobody uses would be NaN behind a derivative that is infinite.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: ctx.size])
        ctx.save_for_forward(*tensors[: ctx.size])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        places = [place for place in range(ctx.size) if ctx.needs_input_grad[2 + place]]
        used = [place for place, grad in enumerate(grads) if grad is not None]
        pulled = _pulled(_only(ctx.function, used), ctx.size, places)
        taken = _taken(pulled, (*ctx.saved_tensors, *(grad for grad in grads if grad is not None)))
        back: list[Tensor | None] = [None] * (2 + ctx.size + len(grads))
        for place, grad in zip(places, taken):
            back[2 + place] = grad
        return tuple(back)

    @staticmethod
    def jvp(ctx: Any, function: None, size: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        moving = [(place, tangent) for place, tangent in enumerate(tangents[: ctx.size]) if tangent is not None]
        places = [place for place, _ in moving]
        return _taken(_pushed(ctx.function, ctx.size, places), (*ctx.saved_tensors, *(tangent for _, tangent in moving)))


def _pulled(function: Flat, size: int, places: list[int]) -> Flat:
    """The gradient of `function` at `places` of its `size` arguments: of those arguments and the gradients of its results."""

    def pull(*tensors: Tensor) -> tuple[Tensor, ...]:
        given, grads = tensors[:size], tensors[size:]
        if inside_tracing():
            given = after(grads, given)
        of = [given[place] for place in places]
        if inside_tracing() or inside_transform() or any(tensor.requires_grad for tensor in tensors):
            return cast(tuple[Tensor, ...], torch.func.vjp(_at(function, given, places), *of)[1](grads))
        # torch's own autograd where nothing surrounds it, as `ft.grad` does: torch.func would lose fused kernels.
        with torch.enable_grad():
            of = [leaf.detach().requires_grad_() for leaf in of]
            results = _at(function, given, places)(*of)
        pairs = [(result, grad) for result, grad in zip(results, grads) if result.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, of))
        results, grads = zip(*pairs)
        return torch.autograd.grad(results, of, grads, allow_unused=True, materialize_grads=True)

    return pull


def _pushed(function: Flat, size: int, places: list[int]) -> Flat:
    """The derivative of `function` along tangents at `places` of its `size` arguments: of those arguments and the tangents."""

    def push(*tensors: Tensor) -> tuple[Tensor, ...]:
        given, tangents = tensors[:size], tensors[size:]
        of = tuple(given[place] for place in places)
        return cast(tuple[Tensor, ...], torch.func.jvp(_at(function, given, places), of, tangents)[1])

    return push


def _only(function: Flat, places: list[int]) -> Flat:
    """`function` with its results at `places` alone."""

    def some(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = function(*tensors)
        return tuple(results[place] for place in places)

    return some


def _at(function: Flat, given: Sequence[Tensor], places: list[int]) -> Flat:
    """`function` of its arguments at `places` alone, the others as given."""

    def partial(*some: Tensor) -> tuple[Tensor, ...]:
        filled = list(given)
        for place, tensor in zip(places, some):
            filled[place] = tensor
        return function(*filled)

    return partial


def after(waited_for: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`given`, the same bits, of which a compiler has to believe that they depend on `waited_for`.

    What is computed of them is computed afterwards. Inductor otherwise fuses what reads the same values: it ran both forward
    passes side by side and kept the second one until the backward pass (16 blocks of 6 layers: 95 MiB, 97 without `remat`; with
    this, 14).
    """
    # Plain tensors: vmap, of which the comparison is no business, would map over all params.
    firsts = [below[(0,) * below.ndim] for below in map(plain, waited_for) if below.numel()]
    if not firsts:
        return tuple(given)
    # True of no number, which no compiler may assume: NaN and infinity are not larger than infinity, either.
    never = functools.reduce(torch.logical_or, [_real(first) > float("inf") for first in firsts])
    return tuple(torch.where(never, torch.zeros((), dtype=leaf.dtype, device=leaf.device), leaf) for leaf in given)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value)[0] if value.is_complex() else value


# --- the two calls ------------------------------------------------------------------------------------------------------


class _Precision:
    """The autocast settings of a call, for the call that repeats it."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.devices = sorted({"cpu", *(leaf.device.type for leaf in given)} - {"meta"})
        self.settings = self._current()

    def _current(self) -> list[tuple[bool, torch.dtype]]:
        return [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in self.devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        if self.settings == self._current():
            yield
            return
        with ExitStack() as stack:
            for device, (enabled, dtype) in zip(self.devices, self.settings):
                # What is cached belongs to tensors of this call alone.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


def _refused(function: Callable[..., Any], why: str, kind: Callable[[Tensor], bool]) -> LossError:
    names = dict.fromkeys(name for name, tensor in closed_over(function) if kind(tensor))
    found = f" ({', '.join(tree.quoted(names))})" if any(names) else ""
    called = getattr(function, "__qualname__", type(function).__name__)
    return LossError(
        f"the function {called} given to remat {why}{found} and that is not one of its arguments, so that the backward pass "
        "would not see it: pass it as an argument, ft.remat(lambda params, x: …)(params, x), or .detach() what is a constant"
    )
