"""A loss run on all examples at once, each apart from the others, with a note of every use of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.vmap import lazy_load_decompositions
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from functrain.core import tree
from functrain.core.examples.contribution import Contribution, Rows

# Batched tensors of torch.func.vmap are taken apart and put together here and nowhere else: an autograd.Function with a
# vmap rule of its own is the public way to the same, and takes 200 µs a call where these take 1 (vmap itself: 85 and 15).
_functorch = torch._C._functorch

Make = Callable[[Tensor, Tensor], Contribution]
_EXPANDED = "expanded: a gradient for each example, by autograd"
# A rule takes a call `func(*args, **kwargs)` over, or gives None: then the leaves in it are expanded.
Rule = Callable[["Tape", Any, Any, Any], Any]


class UnfitError(RuntimeError):
    """The gradients of single examples cannot be told from this run of the loss: take another way."""


class LayoutError(UnfitError):
    """The loss depends on how its tensors lie in memory: run it with every tensor as it would lie in a run of one example."""


class OverBudgetError(UnfitError):
    """The expanded leaves of all examples would take more than the budget: take `count` of them at a time."""

    def __init__(self, count: int) -> None:
        super().__init__(f"the budget is enough for {count} examples at a time")
        self.count = count


class Leaf(NamedTuple):
    """A parameter as the loss sees it.

    - `place`: which leaf of params; `value`: what it is, a constant;
    - `live`: the same, with a gradient that nobody asks for: it makes an output that has one, where no input does;
    - `flipped`: whether it is the transpose of that leaf;
    - `steps`: how it was made from that leaf (transposed, cast).
    """

    place: int
    value: Tensor
    live: Tensor
    flipped: bool = False
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def of(self, input: Tensor) -> Tensor:
        """The leaf for a product with `input`: autograd does not take its gradient, and yet the product has one."""
        return self.value if input.requires_grad else self.live

    def transposed(self) -> Leaf:
        """The transpose of a matrix."""
        return self._replace(value=self.value.mT, live=self.live.mT, flipped=not self.flipped)


class Use(NamedTuple):
    """A use of leaves: where the gradient of its output arrives, and what it contributes with the input to which leaf."""

    edge: GradientEdge
    input: Tensor
    makes: list[tuple[int, Make]]


class Tape(TorchFunctionMode):
    """Notes what becomes of `leaves` in calls of torch, while a loss runs under torch.func.vmap over `size` examples.

    An operation with a rule (rules.py) is computed on all examples with constants in place of its leaves, so that autograd
    will not take their gradients, and the gradient of its output is asked for instead. Any other operation is given
    leaves that were expanded, one copy for each example. Leaves are known by identity; where the dimension of
    examples lies is known from vmap.

    What the tape cannot see is found out afterwards: `raw` leaves must have received no gradient, and what is frozen (the
    inputs of layers) must not have been written to.

    With `relay`, layers may give their outputs in another memory layout than the loss would find in a run by itself, since
    some are much faster. Then a view of the one layout may be a copy in the other, so whatever was reshaped is frozen.
    """

    def __init__(self, leaves: Iterable[Tensor], size: int, rules: Mapping[Any, Rule], budget: int, relay: bool = True) -> None:
        super().__init__()
        self.size, self.rules, self.budget, self.relay = size, rules, budget, relay
        self.relaid = False
        self.level = 0
        self.raw = [leaf.detach().requires_grad_() for leaf in leaves]
        self.uses: list[Use] = []
        self.expanded: dict[int, Tensor] = {}
        self._versions = [raw._version for raw in self.raw]
        self._live = [leaf.detach().requires_grad_() for leaf in leaves]
        self._known = {id(raw): Leaf(place, raw.detach(), self._live[place]) for place, raw in enumerate(self.raw)}
        # A tensor that is known by its identity has to stay alive.
        self._alive: list[Tensor] = []
        self._frozen: list[tuple[Tensor, int]] = []

    def run(self, function: Callable[..., Iterable[Tensor]], inputs: Iterable[Tensor]) -> list[Tensor]:
        """The outputs `(N, …)` of a function of one example on inputs `(N, …)`, as by torch.func.vmap.

        Inside, whatever runs in a `with tape:` is noted.
        """
        lazy_load_decompositions()
        self.level = _functorch._vmap_increment_nesting(self.size, "different")
        try:
            return [self.physical(output) for output in function(*map(self.batched, inputs))]
        finally:
            _functorch._vmap_decrement_nesting()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is not None:
            done = rule(self, func, args, kwargs)
            if done is not None:
                return done
        held = self._holds(args) or (kwargs and self._holds(kwargs.values()))
        if held and torch.is_grad_enabled() and not _property(func):
            args, kwargs = tree.map(self._replaced, (tuple(args), kwargs))
        return func(*args, **kwargs)

    # --- for rules ---

    def leaf(self, value: Any) -> Leaf | None:
        """The leaf that `value` is, where a use of it can be recorded: at the level of the examples, with gradients on."""
        leaf = self._known.get(id(value))
        return leaf if leaf is not None and torch.is_grad_enabled() and self.apart() else None

    def apart(self) -> bool:
        """Whether what runs now runs on the examples themselves, not in a transform inside the loss."""
        return _functorch.maybe_current_level() == self.level

    def known(self, value: Any) -> Leaf | None:
        """The leaf that `value` is, anywhere."""
        return self._known.get(id(value))

    def derive(self, given: Tensor, leaf: Leaf, step: Callable[[Tensor], Tensor], flips: bool) -> Tensor:
        """A leaf transposed or cast: a leaf still."""
        made = step(given)
        self._alive.append(made)
        self._known[id(made)] = Leaf(leaf.place, made.detach(), step(leaf.live), leaf.flipped ^ flips, (*leaf.steps, step))
        return made

    def physical(self, value: Tensor) -> Tensor:
        """`value` with its examples as the first dimension: `(N, *value.shape)`."""
        inner, place = _functorch._unwrap_batched(value, self.level)
        if place is None:
            return inner.expand(self.size, *inner.shape)
        return inner if place == 0 else inner.movedim(place, 0)

    def batched(self, value: Tensor) -> Tensor:
        """`value` `(N, …)` as what the loss sees: one example."""
        return _functorch._add_batch_dim(value, 0, self.level)

    def freeze(self, value: Tensor) -> None:
        """Note that `value` must not be written to."""
        value = self.physical(value)
        self._frozen.append((value, value._version))

    def laid(self, output: Tensor) -> Tensor:
        """What a layer gives, in its own layout where that is allowed; else contiguous."""
        if output.is_contiguous():
            return output
        self.relaid = self.relay
        return output if self.relay else output.contiguous()

    def record(self, input: Tensor, output: Tensor, makes: list[tuple[int, Make]], shape: Iterable[int]) -> Tensor:
        """Note that `output` was made of `input` and leaves, and give it to the loss, in the shape `(N, …)`.

        `makes`: for each leaf, what makes a contribution of the input and the output's gradient.
        """
        # The edge, not the tensor: a loss may write into what it is given (nn.ReLU(inplace=True)). The edge of a view
        # would then lead nowhere.
        output = self.laid(output.clone() if output._is_view() else output)
        self.uses.append(Use(_edge(output), input, makes))
        self._frozen.append((input, input._version))
        return self.batched(output.view(tuple(shape)))

    # --- afterwards ---

    def contributions(self, loss: Tensor) -> list[list[Contribution]]:
        """For each leaf what its uses contribute to each example's gradient of that example's loss `(N,)`."""
        if any(raw._version != version for raw, version in zip(self.raw, self._versions)):
            raise UnfitError("the loss changes its params in-place")
        found: list[list[Contribution]] = [[] for _ in self.raw]
        if not loss.requires_grad:
            return found
        edges = [use.edge for use in self.uses]
        edges += [_edge(expanded) for expanded in self.expanded.values()]
        inputs: list[Any] = [*edges, *self.raw]
        grads = torch.autograd.grad(loss, inputs, torch.ones_like(loss), allow_unused=True)
        if any(grad is not None for grad in grads[len(inputs) - len(self.raw) :]):
            raise UnfitError("an operation that cannot be seen uses the params")
        if any(value._version != version for value, version in self._frozen):
            raise LayoutError("the loss writes into what was reshaped") if self.relaid else UnfitError(_READ)
        for use, grad in zip(self.uses, grads):
            if grad is not None:
                input, grad = use.input.detach(), grad.detach()
                for place, make in use.makes:
                    found[place].append(make(input, grad))
        for place, grad in zip(self.expanded, grads[len(self.uses) :]):
            if grad is not None:
                found[place].append(Rows(grad.detach(), _EXPANDED))
        return found

    def _holds(self, values: Iterable[Any]) -> bool:
        known = self._known
        return any(id(value) in known or (isinstance(value, list | tuple) and self._holds(value)) for value in values)

    def _replaced(self, value: Any) -> Any:
        leaf = self._known.get(id(value))
        if leaf is None:
            return value
        copy = self.batched(self._expanded(leaf.place))
        for step in leaf.steps:
            copy = step(copy)
        return copy

    def _expanded(self, place: int) -> Tensor:
        if place not in self.expanded:
            live = self._live[place]
            # Made inside a transform in the loss, it would belong to that.
            with temporarily_clear_interpreter_stack():
                self.expanded[place] = live.expand(self.size, *live.shape)
            each = sum(leaf[0].numel() * leaf.element_size() for leaf in self.expanded.values())
            # Before anything is computed with them: even a product with a number would be one for each example.
            if each * self.size > self.budget and self.size > 1:
                raise OverBudgetError(max(1, self.budget // each))
        return self.expanded[place]


def _edge(output: Tensor) -> GradientEdge:
    assert output.grad_fn is not None
    return GradientEdge(output.grad_fn, output.output_nr)


_READ = "the loss writes into what a layer has read"

# What is read of a tensor as a property has no gradient, but for these.
_VIEWS = ("T", "mT", "H", "mH", "real", "imag")


def _property(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VIEWS
