"""The laws of optimizers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from functrain.core import optim, random, tree
from functrain.core.errors import FunctrainError
from functrain.core.explain import explain
from functrain.core.optim.base import updated
from functrain.core.optim.hyper import placed_in
from functrain.core.tree import Tree
from functrain.runs.store import load_tree, save_tree
from functrain.testing.comparing import LawError, alike, copied, equal, same_bits, unchanged


class _Given(NamedTuple):
    """What one update is given."""

    grads: Tree
    state: Any
    params: Tree
    extra: dict[str, Tensor]


def check_optimizer(
    optimizer: Any, params: Tree = None, *, steps: int = 5, transforms: bool = True, differentiable: bool = True
) -> None:
    """Check that an optimizer is a pair of pure functions, that they compose, and that its faster ways give the same numbers.

    - `update` changes no argument and gives the same bits again; updates are like params, and the state keeps its
      structure, shapes and dtypes;
    - `fused`, if there is one, is `params + updates`, and leaves the gradients as they are;
    - `with_hyper` sets each hyperparameter, and the same number again gives the same bits;
    - params and state written by `ft.save_tree` and read by `ft.load_tree` go on with the same bits;
    - `torch.func.vmap(update)` is the loop over members;
    - traced on tensors without values, the update is one graph, which gives the same numbers at any count;
    - the gradient of the params after three updates with respect to the params before them, the gradients and every
      hyperparameter agrees with finite differences in float64, and is finite where params or gradients are exactly 0.

    `optimizer`: an `Optimizer`, or any pair `init(params)`, `update(grads, state, params)`. `params`: what it is to be tried
    on, where a tree of a matrix, a vector, a scalar, a kernel of four dimensions and an empty leaf will not do.
    `transforms=False` leaves the last three out, for an update that looks at values; `differentiable=False` the last, for
    one whose derivatives are not those of its numbers.

    Raises `LawError` naming the law and the counter-example.

    >>> import functrain as ft
    >>> check_optimizer(ft.optim.adamw(1e-3))
    """
    name = explain(optimizer).title
    params = _params() if params is None else params
    rows = _run(name, optimizer, params, steps)
    _check_stored(name, optimizer, rows)
    if placed_in(rows[-1].state):
        _check_hyper(name, optimizer, rows[-1])
    if transforms:
        _check_vmapped(name, optimizer, rows)
        _check_traced(name, optimizer, rows)
    if transforms and differentiable:
        _check_gradients(name, optimizer, params)


def _rounding(params: Tree) -> float | None:
    # What is float32 in the state of params in half precision is as near as these are.
    return 0.05 if any(leaf.itemsize < 4 for leaf in tree.leaves(params)) else None


def _params() -> Tree:
    key = random.key(1)
    w, b, kernel = (random.normal(random.fold_in(key, n), shape) for n, shape in enumerate([(3, 2), (2,), (2, 1, 2, 2)]))
    return {"w": w, "b": (b, torch.tensor(0.5)), "kernel": kernel, "empty": torch.zeros(0, 2)}


def _drawn(like: Tree, key: Tensor) -> Tree:
    """Normal numbers, other ones for every leaf."""
    flat, spec = tree.flatten(like)
    return tree.unflatten(spec, [random.normal(random.fold_in(key, n), p.shape, p.dtype) for n, p in enumerate(flat)])


def _extra(count: int) -> dict[str, Tensor]:
    return {"loss": torch.tensor(1.0 / (count + 1)), "key": random.fold_in(random.key(3), count)}


def _update(optimizer: Any, given: _Given) -> tuple[Tree, Any]:
    return updated(optimizer.update, optimizer, *given)


@contextmanager
def _law(law: str) -> Iterator[None]:
    """What goes wrong in the block is a `LawError` that names the law."""
    try:
        yield
    except FunctrainError:
        raise
    except Exception as error:
        raise LawError(f"{law}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}") from error


def _run(name: str, optimizer: Any, params: Tree, steps: int) -> list[_Given]:
    """Updates one after another, each looked at; what each was given."""
    state = unchanged(f"{name}: init changes nothing", optimizer.init, params)
    way = getattr(optimizer, "fused", None)
    rows, place, fused = [], (params, state), (copied(params), copied(state))
    for count in range(steps):
        rows.append(_Given(_drawn(params, random.fold_in(random.key(2), count)), place[1], place[0], _extra(count)))
        given = rows[-1]
        updates, state = unchanged(f"{name}: update changes nothing", lambda *row: _update(optimizer, _Given(*row)), *given)
        same_bits(f"{name}: update gives the same again", _update(optimizer, given), (updates, state))
        alike(f"{name}: updates are like params", updates, params)
        alike(f"{name}: the state keeps its structure", state, given.state)
        place = (optim.apply_updates(place[0], updates), state)
        if way is not None:
            grads = copied(given.grads)
            fused = updated(way, optimizer, grads, fused[1], fused[0], given.extra)
            equal(f"{name}: fused is update and apply", fused, place, _rounding(params))
            alike(f"{name}: fused keeps shapes and dtypes", fused, place)
            same_bits(f"{name}: fused leaves the gradients as they are", grads, given.grads)
    return rows


def _check_stored(name: str, optimizer: Any, rows: list[_Given]) -> None:
    given = rows[-1]
    with tempfile.TemporaryDirectory() as folder:
        save_tree(f"{folder}/run.safetensors", (given.state, given.params))
        state, params = load_tree(f"{folder}/run.safetensors", (given.state, given.params))
    read = given._replace(state=state, params=params)
    same_bits(f"{name}: saved and loaded, it goes on with the same bits", _update(optimizer, read), _update(optimizer, given))


def _check_hyper(name: str, optimizer: Any, given: _Given) -> None:
    for path, value in _hyper(given.state).items():
        same = _update(optimizer, given._replace(state=optim.with_hyper(given.state, **{path: value.item()})))
        same_bits(f"{name}: with_hyper of the same number", same, _update(optimizer, given))
        other = optim.with_hyper(given.state, **{path: 0.125})
        found = _hyper(other)[path]
        if found.item() != 0.125 or _hyper(given.state)[path] is not value:
            raise LawError(f"{name}: with_hyper({path}=0.125) gives a new state with it, found {found.item()}")


def _hyper(state: Any) -> dict[str, Tensor]:
    return tree.named(optim.hyper(state), "_") if placed_in(state) else {}


def _flat(optimizer: Any, like: _Given) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[[Any], Tree]]:
    """The update as a function from tensors to tensors, and what puts its results together again."""
    spec, shape = tree.structure(like), None

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        nonlocal shape
        results, shape = tree.flatten(_update(optimizer, tree.unflatten(spec, leaves)))
        return tuple(results)

    return one, lambda results: tree.unflatten(shape, results)


def _check_vmapped(name: str, optimizer: Any, rows: list[_Given]) -> None:
    law = f"{name}: vmap of update is the loop"
    one, whole = _flat(optimizer, rows[0])
    with _law(law), warnings.catch_warnings():
        # Slow is not wrong: of some in-place operations torch says that it loops over the members itself.
        warnings.filterwarnings("ignore", "There is a performance drop")
        members = tree.unstack(whole(torch.func.vmap(one)(*tree.leaves(tree.stack(rows)))))
    for given, got in zip(rows, members):
        equal(law, got, _update(optimizer, given), _rounding(rows[0].params))


def _check_traced(name: str, optimizer: Any, rows: list[_Given]) -> None:
    law = f"{name}: traced without values, update is one graph with the same numbers"
    one, whole = _flat(optimizer, rows[0])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _law(law), torch.no_grad():
        graph = make_fx(one)(*map(mode.from_tensor, tree.leaves(rows[0])))
        for given in rows:
            equal(law, whole(graph(*tree.leaves(given))), _update(optimizer, given), _rounding(given.params))


# --- derivatives --------------------------------------------------------------------------------------------------

_UPDATES = 3
_APART = 1e-5


def _check_gradients(name: str, optimizer: Any, params: Tree) -> None:
    start = tree.map(lambda leaf: leaf.detach().double(), params)
    grads = [_drawn(start, random.fold_in(random.key(4), count)) for count in range(_UPDATES)]
    weights = _drawn(start, random.key(5))
    inputs = {"params": start, "grads": grads, "hyper": _hyper(optimizer.init(start))}

    def after(inputs: Any) -> Tensor:
        """One number that depends on all params after the updates."""
        state, now = optimizer.init(inputs["params"]), inputs["params"]
        if inputs["hyper"]:
            state = optim.with_hyper(state, **inputs["hyper"])
        for count, given in enumerate(inputs["grads"]):
            updates, state = _update(optimizer, _Given(given, state, now, _extra(count)))
            now = optim.apply_updates(now, updates)
        return torch.stack([(a * b).sum() for a, b in zip(tree.leaves(now), tree.leaves(weights))]).sum()

    slopes = _slopes(name, after, inputs)
    for place in [("params",), ("grads",), *(("hyper", key) for key in inputs["hyper"])]:
        _check_slope(f"{name}: the derivative by {place[-1]} is that of the numbers", after, inputs, slopes, place)
    zeros = tree.map(torch.zeros_like, (start, grads))
    for what, changed in [("gradients", {"grads": zeros[1]}), ("params", {"params": zeros[0]})]:
        flat = tree.named(_slopes(name, after, {**inputs, **changed}))
        wrong = [path for path, slope in flat.items() if not slope.isfinite().all()]
        if wrong:
            raise LawError(f"{name}: where {what} are 0, derivatives are finite; those by {', '.join(wrong)} are not")


def _slopes(name: str, after: Callable[[Any], Tensor], inputs: Any) -> Any:
    flat, spec = tree.flatten(inputs)
    with _law(f"{name}: three updates can be differentiated"):
        slopes = torch.func.grad(lambda leaves: after(tree.unflatten(spec, leaves)))(tuple(flat))
    return tree.unflatten(spec, slopes)


def _check_slope(law: str, after: Callable[[Any], Tensor], inputs: Any, slopes: Any, place: tuple[str, ...]) -> None:
    """Along one direction of the inputs at `place`: by the gradient, and by differences of fourth order."""

    def found(of: Any) -> Any:
        return of[place[0]] if len(place) == 1 else of[place[0]][place[1]]

    start, apart = found(inputs), _APART
    if isinstance(start, Tensor):
        # An ε of 10⁻⁸ must stay above 0; of one that is much smaller, float64 shows too little.
        apart = min(_APART, 0.03 * start.abs().item()) if start else _APART
        if apart < 1e-10:
            return
    direction = torch.ones_like(start) if isinstance(start, Tensor) else _drawn(start, random.key(6))

    def moved(times: int) -> Tensor:
        there = tree.map(lambda leaf, way: leaf + times * apart * way, start, direction)
        return after({**inputs, place[0]: there if len(place) == 1 else {**inputs[place[0]], place[1]: there}})

    slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * apart)
    along = [(a * b).sum() for a, b in zip(tree.leaves(found(slopes)), tree.leaves(direction))]
    equal(law, torch.stack(along).sum(), slope, 1e-4)
