"""Several players over one state, each with a loss and an optimizer of its own: adversarial training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from functrain.core import random, tree
from functrain.core.deferred import drawn
from functrain.core.entries import Entry
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import Stage, explain
from functrain.core.grad import as_gradient, entry_of, of_entry, which
from functrain.core.guard import chosen
from functrain.core.reduce.base import Gradient, visible
from functrain.core.step import Metrics, State, Step, check_owned, step
from functrain.core.transforms import inside_transform
from functrain.core.tree import Tree

Players = dict[str, tuple[Any, Any]]


class AdversarialState(NamedTuple):
    """The players' optimizer states, by name."""

    inner: dict[str, Any]


def adversarial(
    players: Mapping[str, tuple[Any, Any]], *, every: Mapping[str, int] | None = None, simultaneous: bool = False
) -> Step:
    """One step of several players: each takes its own gradient, of its own entry of the params, with its own optimizer.

    `players` maps a name to `(grad, optimizer)`. A player moves the entry of the params that has its name, or that its
    gradient names, `ft.grad(loss, of="nets.generator")`; to it all else in the params is constant, so what nobody moves stays.
    Every loss gets the params whole. The players are θ₁ … θₙ, with uₖ the update of player k's optimizer:

        θₖ ← θₖ + uₖ(∇θₖ lossₖ(θ₁, …, θₙ)),    one after the other, in the order of `players`: k sees where 1 … k − 1 went;

    with `simultaneous`, each sees where all of them were.

    - `every`: `{"generator": 5}`: this player moves at every 5th position alone (4, 9, …). When it rests, its params,
      optimizer state (and with it its schedules) and the carry stay, and what its loss would be is measured all the same, so
      that a resting player costs what a moving one does;
    - a `key` is folded with the player's number, so no two players draw the same;
    - a `carry` is one for all: it goes through the players' losses that declare it, in their order (a generator's batch norm
      is used by both players; it is updated each time);
    - a deferred batch is drawn once, for all players.

    Metrics are those of a step for each player, `generator.loss`, `generator.weight`, `generator.lr` where scheduled, its aux;
    and `loss`, the sum of the players' losses (so it is not finite where one is not, as `ft.guard` wants to know; in a zero-sum
    game it is 0), with the first player's `weight`. The state is an ordinary one, its `opt` an `AdversarialState`:
    `ft.with_hyper(state, **{"generator.lr": 1e-4})`.

    Raises `ArgumentError` for players that are not gradients with optimizers, and for an `every` that is not a number of at
    least 1 for a player; at `init`, `TreeError` for names that are no entries of the params, and for a tensor that two players
    would move.

    Source: Goodfellow et al., "Generative adversarial nets", NeurIPS 2014.

    >>> import torch, functrain as ft
    >>> x = ft.grad(lambda params, batch: batch * params["x"] * params["y"])
    >>> y = ft.grad(lambda params, batch: -batch * params["x"] * params["y"])
    >>> game = ft.adversarial({"x": (x, ft.optim.sgd(0.5)), "y": (y, ft.optim.sgd(0.5))})
    >>> state = game.init({"x": torch.tensor(1.0), "y": torch.tensor(1.0)})
    >>> state, metrics = game(state, torch.ones(1))
    >>> state.params, metrics["x.loss"], metrics["y.loss"]
    ({'x': tensor(0.5000), 'y': tensor(1.2500)}, tensor(1.), tensor(-0.5000))
    """
    playing = _checked(players)
    pace = _checked_pace(every, playing)
    if not isinstance(simultaneous, bool):
        raise ArgumentError(f"simultaneous must be True or False, got {simultaneous!r}")
    carried = any("carry" in grad.uses for grad, _ in playing.values())
    first = next(iter(playing))
    whole = step(playing[first][0], _Optimizers(lambda params: _started(playing, params)))  # type: ignore[arg-type]
    spare: list[Tree] = []

    def init(params: Tree, *, carry: Tree = None, seed: int | Tensor = 0) -> State:
        _check_apart(playing, params)
        state: State = whole.init(params, carry=carry, seed=seed)
        return state

    def update(state: State, batch: Tree) -> tuple[State, Metrics]:
        check_owned(state)
        batch = drawn(batch)
        spare.clear()
        now, inner, metrics = state, dict[str, Any](), Metrics()
        for number, (name, (grad, optimizer)) in enumerate(playing.items()):
            seen = entry_of(grad, (state if simultaneous else now).params)
            turn = step(_Turn(grad, seen, spare), optimizer)
            carry = now.carry if "carry" in grad.uses or not carried else None
            old = state._replace(
                params=seen.value, opt=state.opt.inner[name], carry=carry, key=random.fold_in(state.key, number)
            )
            new, measured = turn(old, batch)
            if name in pace:
                new = chosen((new.position % pace[name]) == 0, new, old)
            inner[name] = new.opt
            metrics |= {f"{name}.{measure}": value for measure, value in measured.items()}
            params = entry_of(grad, now.params).whole(tree.leaves(new.params))
            now = now._replace(params=params, carry=now.carry if carry is None else new.carry)
        losses = [metrics[f"{name}.loss"] for name in playing]
        metrics = {"loss": sum(losses[1:], losses[0]), "weight": metrics[f"{first}.weight"]} | metrics
        return now._replace(opt=AdversarialState(inner), position=state.position + 1), metrics

    def stage() -> Stage:
        rows = [
            Stage(f"player {name}", _facts(grad, pace.get(name)), [explain(grad), explain(optimizer)])
            for name, (grad, optimizer) in playing.items()
        ]
        moves = "all at once, from the same params" if simultaneous else "one after the other, each from the latest params"
        return Stage("adversarial", {"players move": moves}, rows)

    return Step(init, update, stage)


class _Turn:
    """A player's gradient as a function of what it moves alone, all else in the params being as it is."""

    def __init__(self, grad: Any, seen: Entry, spare: list[Tree]) -> None:
        self.grad, self.seen, self.spare = grad, seen, spare
        self.uses, self.lanes, self.reduce = grad.uses, grad.lanes, grad.reduce

    def __call__(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Any:
        return self.grad(self.seen.whole(tree.leaves(params)), batch, carry=carry, key=key)

    def finished(self, params: Tree, batch: Tree, *, carry: Tree = None, key: Tensor | None = None) -> Gradient:
        taken: Gradient = self.grad.finished(self.seen.whole(tree.leaves(params)), batch, carry=carry, key=key)
        if visible(taken.loss) and not taken.loss.requires_grad:
            # Their memory is let go of when the next step begins: see `step`.
            self.spare.append(taken.grads)
        return taken


class _Optimizers(NamedTuple):
    """What of an optimizer a state is begun with: the players update theirs one by one."""

    init: Any
    update: Any = None


def _started(playing: Players, params: Tree) -> AdversarialState:
    return AdversarialState({name: opt.init(entry_of(grad, params).value) for name, (grad, opt) in playing.items()})


def _facts(grad: Any, every: int | None) -> dict[str, str]:
    of = which(grad)
    facts = {"moves": " and ".join(tree.quoted((of,) if isinstance(of, str) else of or ()))}
    return facts | ({"every": f"{every} positions, resting in between"} if every is not None else {})


# --- what players may be -------------------------------------------------------------------------------------------


def _checked(players: Any) -> Players:
    order = 'write ft.adversarial({"generator": (ft.grad(loss), ft.optim.adam(1e-4)), …})'
    if not isinstance(players, Mapping):
        raise ArgumentError(f"players map names to (grad, optimizer), got {type(players).__name__}: {order}")
    if not players:
        raise ArgumentError(f"there are no players: {order}")
    return {name: _player(name, player, order) for name, player in players.items()}


def _player(name: Any, player: Any, order: str) -> tuple[Any, Any]:
    if not isinstance(name, str) or not name or "." in name:
        raise ArgumentError(
            f"a player's name is a text without dots, as its measures are called by it, got {name!r}: for an inner entry write "
            '{"generator": (ft.grad(loss, of="nets.generator"), …)}'
        )
    if not isinstance(player, tuple) or len(player) != 2:
        raise ArgumentError(f"player {name!r} is a pair (grad, optimizer), got {explain(player).title}: {order}")
    grad, optimizer = player
    try:
        as_gradient(grad)
        # It is a step that knows what an optimizer is.
        step(grad, optimizer)
        return of_entry(grad, name), optimizer
    except ArgumentError as error:
        raise ArgumentError(f"player {name!r}: {error}") from error


def _checked_pace(every: Any, playing: Players) -> dict[str, int]:
    if every is not None and not isinstance(every, Mapping):
        raise ArgumentError(f'every maps players to numbers of positions, {{"generator": 5}}, got {every!r}')
    for name, positions in (every or {}).items():
        if name not in playing:
            raise ArgumentError(f"every has {name!r}, which is no player: expected one of {', '.join(tree.quoted(playing))}")
        if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
            raise ArgumentError(f"every[{name!r}] must be an int of at least 1, got {positions!r}")
    return {name: positions for name, positions in (every or {}).items() if positions > 1}


def _check_apart(playing: Players, params: Tree) -> None:
    """Raise `TreeError` where two players would move one tensor: copied into the state, each would have its own."""
    owners: dict[Any, str] = {}
    for name, (grad, _) in playing.items():
        mine = {_identity(leaf): path for path, leaf in tree.named(entry_of(grad, params).value).items()}
        for identity, path in mine.items():
            if identity in owners:
                where = f"{which(grad)}.{path}" if path and isinstance(which(grad), str) else path or which(grad)
                raise TreeError(
                    f"players {owners[identity]!r} and {name!r} would both move the tensor at {where!r}: let one of them move "
                    "it, and the other's loss read it; or give each a copy"
                )
        owners |= dict.fromkeys(mine, name)


def _identity(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or inside_transform() or not leaf.numel():
        return id(leaf)
    return leaf.untyped_storage()._cdata, leaf.storage_offset()
