"""From `nn.Module` to a pure function of its parameters, safe in any number of threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from functrain.core import random
from functrain.core.errors import ArgumentError, LossError, TreeError
from functrain.core.explain import Stage
from functrain.core.transforms import inside_transform
from functrain.core.tree import Tree, quoted

Slot = tuple[dict[str, Tensor | None], str]
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNKEYED = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RNNBase, nn.MultiheadAttention)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def functional(module: nn.Module) -> tuple[dict[str, Tensor], Apply]:
    """Split a module into its parameters and a pure function: `params, apply = functional(module)`.

    `params` maps dotted names to copies of the parameters (tied ones once), so the module itself is left alone.
    `apply(params, *inputs)` is the module's forward with these parameters; see `Apply` for mode, buffers and
    randomness. Raises `ArgumentError` for a module with uninitialised (lazy) parameters.

    >>> params, apply = functional(nn.Linear(3, 2))
    >>> list(params), apply(params, torch.zeros(4, 3)).shape
    (['weight', 'bias'], torch.Size([4, 2]))
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"functional takes an nn.Module, got {type(module).__name__}")
    lazy = [name for name, value in module.named_parameters() if isinstance(value, nn.UninitializedParameter)]
    if lazy:
        raise ArgumentError(f"parameters {', '.join(quoted(lazy))} are not initialised: run the module once before")
    params = {name: value.detach().clone() for name, value in module.named_parameters()}
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    return params, Apply(_Skeletons(module), buffers, None)


class Apply:
    """A module's forward as a function: `apply(params, *inputs, carry=None, key=None)`.

    - Without `carry`, buffers are the constants that the module came with, and the output alone is returned.
      With `carry` (a dict like `apply.buffers`), it is used for the buffers, and `(output, carry)` is returned:
      this is how batch norm's running statistics are threaded. A module that updates buffers needs it
      when training: `LossError` says so.
    - `apply.train()` and `apply.eval()` are the same function in that mode; without either, every submodule
      keeps the mode that it had. Nothing is switched in place.
    - `key` serves every `nn.Dropout` in the module: shape `(N,)`, one for each example, or 0-d for all.

    Each call has a copy of the module to itself, without memory (on the meta device): `functional_call` on one shared
    module races silently (gradients of other threads' parameters), and this does not.
    """

    def __init__(self, skeletons: _Skeletons, buffers: dict[str, Tensor], training: bool | None) -> None:
        self._skeletons = skeletons
        self._training = training
        self.buffers = buffers

    def train(self) -> Apply:
        """The same function with every submodule in training mode."""
        return Apply(self._skeletons, self.buffers, True)

    def eval(self) -> Apply:
        """The same function with every submodule in evaluation mode."""
        return Apply(self._skeletons, self.buffers, False)

    def __call__(
        self, params: dict[str, Tensor], *inputs: Any, carry: Tree = None, key: Tensor | None = None, **keywords: Any
    ) -> Any:
        with self._skeletons.lent(self._training) as skeleton:
            return self._run(skeleton, params, inputs, carry, key, keywords)

    def _run(
        self, skeleton: _Skeleton, params: dict[str, Tensor], inputs: Any, carry: Tree, key: Tensor | None, keywords: Any
    ) -> Any:
        if carry is None and skeleton.updates:
            raise LossError(
                f"the module updates its buffers when training ({', '.join(quoted(skeleton.updates[:2]))} …): declare "
                "`carry` in the loss, call apply(params, x, carry=carry), return (losses, carry), and start with "
                "step.init(params, carry=apply.buffers); or use apply.eval()"
            )
        buffers = self.buffers if carry is None else _owned(carry)
        return skeleton.run(params, buffers, key, carry is not None, inputs, keywords)

    def __repr__(self) -> str:
        return f"<apply {self._skeletons.name}, mode {self._mode()}, {len(self.buffers)} buffers>"

    def _mode(self) -> str:
        return {None: "as the module was", True: "train", False: "eval"}[self._training]

    def explain(self) -> Stage:
        """What this function is: its module and mode."""
        return Stage(f"apply {self._skeletons.name}", {"mode": self._mode(), "buffers": str(len(self.buffers))})


def _owned(carry: dict[str, Tensor]) -> dict[str, Tensor]:
    # The module writes into its buffers; the caller's carry stays as it was.
    return {name: value.clone() for name, value in carry.items()}


class _KeyedDropout(nn.Module):
    """Stands in for a dropout module: the same zeros for the same key, in every plan."""

    def __init__(self, original: nn.modules.dropout._DropoutNd, name: str, number: int) -> None:
        super().__init__()
        self.p, self.name, self.number = float(original.p), name, number
        self.channels = isinstance(original, _CHANNELS)
        self.key: Tensor | None = None
        self.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.key is None:
            raise LossError(
                f"dropout {self.name!r} has no randomness: declare `key` in the loss and call "
                "apply(params, x, key=key); or use apply.eval()"
            )
        return random.dropout(x, self.p, random.fold_in(self.key, self.number), channels=self.channels)


class _Skeletons:
    """Memory-less copies of a module, in each mode as many as were ever in use at once.

    A call borrows one and gives it back, so that no two calls share one: not two threads, and not a call inside a call.
    Threads that live for one step (`parallel`) find those of the step before: a copy of a small network takes a millisecond.
    """

    def __init__(self, module: nn.Module) -> None:
        self.name = type(module).__name__
        self._template = _serve_dropout(_without_memory(module))
        self._placeholders = [*self._template.parameters(), *self._template.buffers()]
        self._free: dict[bool | None, list[_Skeleton]] = {None: [], True: [], False: []}

    @contextmanager
    def lent(self, training: bool | None) -> Iterator[_Skeleton]:
        """A copy in this mode that nobody else uses within the block."""
        free = self._free[training]
        try:
            # Two threads cannot take the same one: popping from a list is atomic.
            skeleton = free.pop()
        except IndexError:
            skeleton = self._copy(training)
        try:
            yield skeleton
        finally:
            free.append(skeleton)

    def _copy(self, training: bool | None) -> _Skeleton:
        # Only the modules are copied: the placeholders without memory are shared, since nothing writes to them,
        # and copying a tensor would show up in a trace that surrounds this call.
        module = copy.deepcopy(self._template, {id(leaf): leaf for leaf in self._placeholders})
        return _Skeleton(module if training is None else module.train(training))


def _without_memory(module: nn.Module) -> nn.Module:
    # `.to("meta")` would untie shared parameters; a copy that is told what becomes of each tensor keeps them tied.
    memo: dict[int, Any] = {
        id(leaf): nn.Parameter(torch.empty_like(leaf, device="meta"), leaf.requires_grad) for leaf in module.parameters()
    }
    memo |= {id(leaf): torch.empty_like(leaf, device="meta") for leaf in module.buffers()}
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise ArgumentError(
            f"{type(module).__name__} cannot be copied ({error}): where it uses torch.nn.utils.weight_norm or spectral_norm, "
            "take those of torch.nn.utils.parametrizations"
        ) from error


def _serve_dropout(module: nn.Module) -> nn.Module:
    kinds = (nn.Dropout, *_CHANNELS)
    if isinstance(module, kinds):
        return _KeyedDropout(module, "", 0)
    found = [
        (parent, child, f"{path}.{child}".lstrip("."))
        for path, parent in module.named_modules()
        for child, value in parent._modules.items()
        if isinstance(value, kinds)
    ]
    served: dict[int, nn.Module] = {}
    for number, (parent, child, path) in enumerate(found):
        original = parent._modules[child]
        assert isinstance(original, nn.modules.dropout._DropoutNd)
        # A module that stands in two places stays one module.
        parent._modules[child] = served.setdefault(id(original), _KeyedDropout(original, path, number))
    return module


class _Skeleton:
    """A module without memory, and the slots to lend it tensors for the time of a call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.params = _slots(module, "_parameters")
        self.buffers = _slots(module, "_buffers")
        self.dropouts = [child for child in module.modules() if isinstance(child, _KeyedDropout)]
        self.tried = False
        self.updates = [
            f"{path}.running_mean".lstrip(".")
            for path, child in module.named_modules()
            if isinstance(child, _NORMS) and child.training and child.track_running_stats
        ]
        for child in module.modules():
            if isinstance(child, _NORMS) and child.running_mean is not None:
                child.forward = partial(_in_statistics, child, child.forward)  # type: ignore[method-assign]
        for path, child in module.named_modules():
            if isinstance(child, _UNKEYED) and child.training and _draws(child):
                raise ArgumentError(
                    f"{path or 'the module'} ({type(child).__name__}) draws dropout from the global generator, which "
                    "cannot be replayed: set its dropout to 0 and add an nn.Dropout, or use apply.eval()"
                )

    def run(
        self,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        key: Tensor | None,
        threaded: bool,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Any:
        if params.keys() != self.params.keys():
            raise TreeError(f"params do not fit {type(self.module).__name__}: {_differ(self.params, params)}")
        if buffers.keys() != self.buffers.keys():
            raise TreeError(f"carry does not fit the buffers of {type(self.module).__name__}: {_differ(self.buffers, buffers)}")
        if not threaded and not self.tried:
            # A module that writes into its buffers is found out on copies of them.
            self.tried, buffers = True, _owned(buffers)
        watch = None if threaded or inside_transform() else {name: value._version for name, value in buffers.items()}
        before = self._lend(params, buffers, key)
        try:
            output = self.module(*inputs, **keywords)
            after = {name: slots[0][0][slots[0][1]] for name, slots in self.buffers.items()}
        finally:
            for holder, name, value in before:
                holder[name] = value
            for dropout in self.dropouts:
                dropout.key = None
        if watch is not None:
            changed = [
                name for name, value in buffers.items() if after[name] is not value or value._version != watch[name]
            ]
            if changed:
                raise LossError(f"the module changes its buffers {', '.join(quoted(changed))}: thread them with carry=")
        return (output, after) if threaded else output

    def _lend(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], key: Tensor | None
    ) -> list[tuple[dict[str, Tensor | None], str, Tensor | None]]:
        before = []
        for slots, values in ((self.params, params), (self.buffers, buffers)):
            for name, places in slots.items():
                for holder, place in places:
                    before.append((holder, place, holder[place]))
                    holder[place] = values[name]
        for dropout in self.dropouts:
            dropout.key = key
        return before


def _in_statistics(norm: Any, forward: Callable[..., Tensor], x: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    """A norm of inputs in half precision beside wider statistics, computed in their dtype: torch cannot vmap it mixed."""
    wide = norm.running_mean.dtype
    if x.itemsize >= wide.itemsize:
        return forward(x, *rest, **keywords)
    for place in ("weight", "bias"):
        # As what is cast: lent for this call alone.
        if (lent := norm._parameters.get(place)) is not None:
            norm._parameters[place] = lent.to(wide)
    return forward(x.to(wide), *rest, **keywords).to(x.dtype)


def _draws(module: nn.Module) -> bool:
    chance: Any = getattr(module, "dropout", None) or getattr(module, "p", None)
    return bool(chance)


def _slots(module: nn.Module, kind: str) -> dict[str, list[Slot]]:
    names: dict[int, str] = {}
    slots: dict[str, list[Slot]] = {}
    for path, child in module.named_modules():
        for place, value in getattr(child, kind).items():
            if value is not None:
                name = names.setdefault(id(value), f"{path}.{place}".lstrip("."))
                slots.setdefault(name, []).append((getattr(child, kind), place))
    return slots


def _differ(expected: dict[str, Any], got: dict[str, Any]) -> str:
    missing, extra = [n for n in expected if n not in got], [n for n in got if n not in expected]
    return "; ".join(
        f"{what} {', '.join(quoted(names[:4]))}" for what, names in (("missing", missing), ("unexpected", extra)) if names
    )


def states(apply: Callable[..., Any]) -> dict[str, Tensor]:
    """A copy of the buffers that `apply` starts from: the carry of a run's first step."""
    if not isinstance(apply, Apply):
        raise ArgumentError(f"states takes what functional(module) returned, got {type(apply).__name__}")
    return _owned(apply.buffers)
