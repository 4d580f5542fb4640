"""The laws as checkers: run them on a reducer, optimizer, gradient or step of your own.

Each checker returns None, or raises `LawError`, which names the law and the first counter-example to it. "Equal" is
up to the rounding of the dtype, "the same bits" is `torch.equal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from functrain.core import optim, random, tree
from functrain.core.errors import ArgumentError, DonatedError, FunctrainError
from functrain.core.explain import explain
from functrain.core.grad import grad as gradient_of
from functrain.core.optim import Optimizer
from functrain.core.reduce import Gradient, Reducer
from functrain.core.step import Step
from functrain.core.tree import Tree
from functrain.data.laws import check_prefetch, check_source
from functrain.engine.parallel import parallel

__all__ = ["LawError", "check_grad", "check_optimizer", "check_prefetch", "check_reducer", "check_source", "check_step"]
__all__ += ["equal", "same_bits"]


class LawError(FunctrainError, AssertionError):
    """A part breaks a law that functrain builds on; the message has the law and the counter-example."""


# --- comparing trees -------------------------------------------------------------------------------------------


def same_bits(law: str, got: Tree, expected: Tree) -> None:
    """Raise `LawError` unless both trees have one structure, and leaves of the same dtype, shape and bits.

    >>> same_bits("Copying changes nothing", {"w": torch.ones(2).clone()}, {"w": torch.ones(2)})
    """
    _compare(law, got, expected, lambda a, b: a.dtype == b.dtype and _bits_equal(a, b))


def equal(law: str, got: Tree, expected: Tree, tolerance: float | None = None) -> None:
    """Raise `LawError` unless both trees agree up to rounding.

    |got − expected| ≤ tolerance · max(1, max |expected|), leaf by leaf; the tolerance is 10⁻⁴ for float32, 10⁻⁹ for
    float64 and 0.05 below.

    >>> equal("Halves add up", torch.tensor(1.0) / 3 * 3, torch.tensor(1.0))
    """

    def close(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point():
            return torch.equal(a, b)
        bound = tolerance if tolerance is not None else {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 0.05)
        scale = max(1.0, b.detach().double().nan_to_num().abs().max().item()) if b.numel() else 1.0
        return torch.allclose(a.double(), b.double(), rtol=0.0, atol=bound * scale, equal_nan=True)

    _compare(law, got, expected, close)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _compare(law: str, got: Tree, expected: Tree, agree: Callable[[Tensor, Tensor], bool]) -> None:
    if not tree.same_structure(got, expected):
        raise LawError(f"{law}: the results differ in structure, {tree.difference(expected, got)}")
    for path, a, b in zip(tree.paths(expected), tree.leaves(got), tree.leaves(expected)):
        if a.shape != b.shape or not agree(a.detach(), b.detach()):
            where = f" at {path!r}" if path else ""
            raise LawError(f"{law}: counter-example{where}, got {_shown(a)}, expected {_shown(b)}")


def _shown(leaf: Tensor) -> str:
    values = leaf.detach().reshape(-1)[:4].tolist()
    return f"{leaf.dtype} {tuple(leaf.shape)} {values}{' …' if leaf.numel() > 4 else ''}"


def _copy(value: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _unchanged(law: str, call: Callable[..., Any], *arguments: Tree) -> Any:
    """What `call(*arguments)` gives; `LawError` when it changed an argument."""
    before = _copy(arguments)
    result = call(*arguments)
    same_bits(law, arguments, before)
    return result


# --- reducers --------------------------------------------------------------------------------------------------


def _line(params: Tree, batch: Tree) -> tuple[Tensor, Tensor]:
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2, batch["weight"]


def _line_problem(size: int = 7) -> tuple[Tree, Tree]:
    key = random.key(0)
    x, y = (random.normal(random.fold_in(key, n), shape, torch.float64) for n, shape in enumerate([(size, 3), (size,)]))
    params = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), "b": torch.tensor(0.1, dtype=torch.float64)}
    return params, {"x": x, "y": y, "weight": random.uniform(random.fold_in(key, 2), (size,), torch.float64) + 0.5}


def check_reducer(reducer: Reducer, examples: Sequence[Gradient] | None = None) -> None:
    """Check that a reducer is a monoid over gradients, and linear if it says so.

    - `merge` is associative, up to rounding, and `lift`, `merge` and `finish` change none of their arguments;
    - `finish` gives a `Gradient` of the params' structure;
    - a `linear` reducer has zero sums as its identity, and over parts gives what one gradient over the batch gives.

    `examples`: at least three unfinished gradients of the same params; default: of a weighted linear regression.

    >>> import functrain as ft
    >>> check_reducer(ft.reduce.mean)
    """
    if not isinstance(reducer, Reducer):
        raise ArgumentError(f"check_reducer takes a Reducer(name, merge, finish), got {explain(reducer).title}")
    name = repr(reducer)
    params, batch = _line_problem()
    taken = gradient_of(_line)
    if examples is None:
        examples = [taken(params, part) for part in tree.divide(batch, 3)]
    lifted = [_unchanged(f"{name}: lift changes nothing", reducer.lift, g._replace(carry=None)) for g in examples]

    def merge(a: Any, b: Any) -> Any:
        return _unchanged(f"{name}: merge changes nothing", reducer.merge, a, b)

    for a, b, c in zip(lifted, lifted[1:], lifted[2:]):
        equal(f"{name}: merge is associative", merge(merge(a, b), c), merge(a, merge(b, c)))
    total = tree.tree_reduce(merge, lifted)
    result = _unchanged(f"{name}: finish changes nothing", reducer.finish, total)
    if not isinstance(result, Gradient) or not tree.same_structure(result.grads, examples[0].grads):
        raise LawError(f"{name}: finish gives a Gradient whose grads are like params, got {explain(result).title}")
    if reducer.linear:
        zero = tree.map(torch.zeros_like, lifted[0])
        equal(f"{name}: nothing is the identity", merge(lifted[0], zero), lifted[0])
        whole = reducer.finish(reducer.lift(taken(params, batch)))
        for parts in (1, 2, 3, len(batch["y"]), 50):
            cut = parallel(taken, parts, reducer, how="loop").finished(params, batch)
            equal(f"{name}: linear, so {parts} parts are the whole", cut, whole)


# --- optimizers ------------------------------------------------------------------------------------------------


def check_optimizer(optimizer: Optimizer, params: Tree = None, *, steps: int = 5) -> None:
    """Check that an optimizer is a pair of pure functions, and that its faster ways give the same numbers.

    - `update` changes no argument; updates are like params, and the state keeps its structure, shapes and dtypes;
    - `torch.func.vmap(update)` is the loop over members; `fused`, if there is one, is `params + updates`;
    - `with_hyper` sets each hyperparameter, and the same number again gives the same bits.

    >>> import functrain as ft
    >>> check_optimizer(ft.optim.adamw(1e-3))
    """
    name = optimizer.name
    if params is None:
        key = random.key(1)
        params = {"w": random.normal(key, (3, 2)), "b": (random.normal(random.fold_in(key, 1), (2,)), torch.tensor(0.5))}
    state = _unchanged(f"{name}: init changes nothing", optimizer.init, params)
    members, place, fused = [], (params, state), (_copy(params), _copy(state))
    for count in range(steps):
        key = random.fold_in(random.key(2), count)
        grads = tree.map(lambda p, key=key: random.normal(random.fold_in(key, p.numel()), p.shape, p.dtype), params)
        members.append((grads, place[1], place[0]))
        updates, state = _unchanged(f"{name}: update changes nothing", optimizer.update, *members[-1])
        _alike(f"{name}: updates are like params", updates, params)
        _alike(f"{name}: the state keeps its structure", state, members[-1][1])
        place = (optim.apply_updates(place[0], updates), state)
        if optimizer.fused is not None:
            fused = optimizer.fused(_copy(grads), fused[1], fused[0])
            equal(f"{name}: fused is update and apply", fused, place)
    _check_vmapped(optimizer, members)
    if hasattr(state, "hyper"):
        _check_hyper(optimizer, *members[-1])


def _alike(law: str, got: Tree, expected: Tree) -> None:
    _compare(law, got, expected, lambda a, b: a.dtype == b.dtype)


def _check_vmapped(optimizer: Optimizer, members: list[Any]) -> None:
    flat, spec = tree.flatten(tree.stack(members))
    shape = None

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal shape
        results, shape = tree.flatten(optimizer.update(*tree.unflatten(spec, leaves)))
        return tuple(results)

    outputs = torch.func.vmap(one)(*flat)
    assert shape is not None
    for member, got in zip(members, tree.unstack(tree.unflatten(shape, outputs))):
        equal(f"{optimizer.name}: vmap of update is the loop", got, optimizer.update(*member))


def _check_hyper(optimizer: Optimizer, grads: Tree, state: Any, params: Tree) -> None:
    for path, value in tree.named(optim.hyper(state), "_").items():
        same = optimizer.update(grads, optim.with_hyper(state, **{path: value}), params)
        same_bits(f"{optimizer.name}: with_hyper of the same number", same, optimizer.update(grads, state, params))
        other = optim.with_hyper(state, **{path: 0.125})
        found = tree.named(optim.hyper(other), "_")[path]
        if found.item() != 0.125 or tree.named(optim.hyper(state), "_")[path] is not value:
            raise LawError(f"{optimizer.name}: with_hyper({path}=0.125) gives a new state with it, found {found.item()}")


# --- gradients -------------------------------------------------------------------------------------------------


def check_grad(
    grad: Any, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None, vmap: bool = True
) -> None:
    """Check that a gradient is a pure, unfinished sum that every plan computes alike.

    - it changes none of its arguments, gives the same bits again, and grads like params;
    - parts add up to the whole in every plan (of a loss that threads a shared carry: the unfused plans agree);
    - it nests: under `torch.func.grad` its `loss` has its `grads` as gradient, under vmap it is the loop.

    `vmap=False` leaves vmap out, for modules that have no rule for it (nn.LSTM).

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch @ params["w"]) ** 2
    >>> check_grad(ft.grad(loss), {"w": torch.ones(2)}, torch.arange(10.0).reshape(5, 2))
    """
    name = explain(grad).title

    def take(params: Tree) -> Any:
        return grad(params, batch, carry=carry, key=key)

    whole = _unchanged(f"{name}: arguments are unchanged", lambda *_: take(params), params, batch, carry, key)
    same_bits(f"{name}: the same again", take(params), whole)
    _alike(f"{name}: grads are like params", whole.grads, params)
    shared = carry is not None and not grad.lanes
    plans: list[Any] = ["loop", "threads"] + (["vmap"] if vmap else []) + ([] if shared else ["fused"])
    for parts in (2, 3, tree.batch_size(batch)):
        results = [parallel(grad, parts, how=how, workers=2)(params, batch, carry=carry, key=key) for how in plans]
        for how, result in zip(plans, results):
            equal(f"{name}: {parts} parts, {how}", result, results[0] if shared else whole)
    _check_nesting(name, take, params, whole, vmap)


def _check_nesting(name: str, take: Callable[[Tree], Any], params: Tree, whole: Any, vmap: bool) -> None:
    flat, spec = tree.flatten(params)
    outer = torch.func.grad(lambda leaves: take(tree.unflatten(spec, leaves)).loss)(tuple(flat))
    equal(f"{name}: under torch.func.grad", tree.unflatten(spec, outer), whole.grads)
    if vmap:
        half = tree.map(lambda leaf: leaf / 2, params)
        both = torch.func.vmap(lambda *leaves: tuple(tree.leaves(take(tree.unflatten(spec, leaves)).grads)))
        stacked = tree.unflatten(spec, both(*tree.leaves(tree.stack([params, half]))))
        for got, member in zip(tree.unstack(stacked), (params, half)):
            equal(f"{name}: vmap is the loop", got, take(member).grads)


# --- steps -----------------------------------------------------------------------------------------------------


def check_step(step: Step, start: Tree, batches: Iterable[Tree]) -> None:
    """Check that a step is a function of its state and batch alone, and that the state is all there is to a run.

    - the same bits when run again; the batch is unchanged, and so is the state, unless the step donates: then
      the old state cannot be used again;
    - resume: a run that stops after any step, has its state written to bytes and read again, goes on with the same bits.

    `start`: a state of the step, or params for `step.init`.

    >>> import functrain as ft
    >>> loss = lambda params, batch: (batch - params["mean"]) ** 2
    >>> check_step(ft.step(ft.grad(loss), ft.optim.adam(0.1)), {"mean": torch.tensor(0.0)}, [torch.ones(3)] * 3)
    """
    name = explain(step).title
    rows = list(batches)
    first = _copy(start) if hasattr(start, "position") else step.init(start)
    states, metrics = [_copy(first)], []
    for batch in rows:
        given = _copy(states[-1])
        new, measured = _unchanged(f"{name}: the batch is unchanged", lambda b, given=given: step(given, b), batch)
        if step.donates:
            _check_donated(name, step, given, batch)
        else:
            same_bits(f"{name}: the state given is unchanged", given, states[-1])
        states.append(_copy(new))
        metrics.append(_copy(measured))
    for stop in range(len(rows)):
        state = _reread(states[stop])
        for place in range(stop, len(rows)):
            state, measured = step(state, rows[place])
            law = f"{name}: resumed after step {stop}, step {place + 1} has the same bits"
            same_bits(law, (state, measured), (states[place + 1], metrics[place]))


def _check_donated(name: str, step: Step, given: Any, batch: Tree) -> None:
    try:
        step(given, batch)
    except DonatedError:
        return
    raise LawError(f"{name}: it donates, so using a state again is a DonatedError; nothing was raised")


def _reread(state: Any) -> Any:
    flat, spec = tree.flatten(state)
    loaded = load(save({str(place): leaf.contiguous() for place, leaf in enumerate(flat)}))
    return tree.unflatten(spec, [loaded[str(place)] for place in range(len(flat))])
