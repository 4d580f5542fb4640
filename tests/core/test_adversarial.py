"""Several players over one state: against closed forms, and against loops with two optimizers of torch.optim."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.testing import check_guard, check_step, equal, same_bits

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


# --- a bilinear game: min over x, max over y of x · y -----------------------------------------------------------------


def minimise(params: Any, batch: Tensor) -> Tensor:
    return batch * params["x"] * params["y"]


def maximise(params: Any, batch: Tensor) -> Tensor:
    return -minimise(params, batch)


def game(rate: Any = 0.1, **options: Any) -> ft.Step:
    players = {"x": (ft.grad(minimise), ft.optim.sgd(rate)), "y": (ft.grad(maximise), ft.optim.sgd(rate))}
    return ft.adversarial(players, **options)


ONE = torch.ones(3, dtype=F64)
START = {"x": number(1.0), "y": number(0.5)}


def run(step: ft.Step, state: Any, steps: int, batch: Any = ONE) -> Any:
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


def test_simultaneous_players_spiral_out_as_the_powers_of_a_complex_number() -> None:
    # x + iy ← (x + iy)(1 + iη).
    state = run(game(simultaneous=True), game().init(START), 50)
    z = (1.0 + 0.5j) * (1 + 0.1j) ** 50
    assert (state.params["x"].item(), state.params["y"].item()) == pytest.approx((z.real, z.imag), rel=1e-12)


def test_alternating_players_circle_as_the_powers_of_a_matrix() -> None:
    state = run(game(), game().init(START), 50)
    x, y = np.linalg.matrix_power(np.array([[1, -0.1], [0.1, 1 - 0.1**2]]), 50) @ [1.0, 0.5]
    assert (state.params["x"].item(), state.params["y"].item()) == pytest.approx((x, y), rel=1e-12)
    # What stays: x² + y² − ηxy.
    assert x * x + y * y - 0.1 * x * y == pytest.approx(1.25 - 0.05, rel=1e-12)


def test_the_order_of_moves_is_that_of_the_players() -> None:
    players = {"y": (ft.grad(maximise), ft.optim.sgd(0.1)), "x": (ft.grad(minimise), ft.optim.sgd(0.1))}
    step = ft.adversarial(players)
    state, metrics = step(step.init(START), ONE)
    assert state.params["y"].item() == pytest.approx(0.6)
    assert state.params["x"].item() == pytest.approx(1 - 0.06)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"loss": -0.5 + 0.6, "weight": 3.0, "y.loss": -0.5, "y.weight": 3.0, "x.loss": 0.6, "x.weight": 3.0}
    )


def test_a_player_moves_at_its_own_pace_and_its_schedule_counts_its_moves() -> None:
    step = game(ft.optim.piecewise(0.1, {1: 0.5, 2: 0.5}), every={"x": 3})
    state = step.init(START)
    x, y, rates = 1.0, 0.5, []
    for position in range(8):
        state, metrics = step(state, ONE)
        if (position + 1) % 3 == 0:
            x -= 0.1 * 0.5 ** min(2, position // 3) * y
        y += 0.1 * 0.5 ** min(2, position) * x
        assert (state.params["x"].item(), state.params["y"].item()) == pytest.approx((x, y), rel=1e-12)
        rates.append(metrics["x.lr"].item())
    assert rates == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 2)
    assert (state.opt.inner["x"].steps.item(), state.opt.inner["y"].steps.item()) == (2, 8)


def test_what_nobody_moves_stays_and_entries_may_be_named() -> None:
    def loss(params: Any, batch: Tensor) -> Tensor:
        return batch * params["nets"]["x"] * params["y"] * params["fixed"]

    params = {"nets": {"x": number(1.0)}, "y": number(2.0), "fixed": number(3.0), "count": torch.tensor(7)}
    step = ft.adversarial(
        {
            "first": (ft.parallel(ft.grad(loss, of="nets.x"), 2), ft.optim.sgd(0.1)),
            "second": (ft.monitor(ft.grad(loss, of=("y",))), ft.optim.adam(0.5)),
        }
    )
    state, metrics = step(step.init(params), ONE)
    assert state.params["nets"]["x"].item() == pytest.approx(1 - 0.1 * 6)
    assert state.params["y"].item() == pytest.approx(1.5)
    same_bits("fixed", [state.params["fixed"], state.params["count"]], [params["fixed"], params["count"]])
    assert metrics["second.gradient.norm"].item() == pytest.approx(3 * 0.4)
    assert ft.hyper(ft.with_hyper(state, **{"first.lr": 0.25}))["first.lr"].item() == 0.25


# --- a small GAN --------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A generator and a discriminator of points in the plane."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        layers = [nn.BatchNorm1d(8)] if norm else []
        self.generator = nn.Sequential(nn.Linear(3, 8), *layers, nn.Tanh(), nn.Linear(8, 2)).double()
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()


def gan(pair: Pair, rate: Any = 1e-2, parts: int = 1, **options: Any) -> tuple[ft.Step, Any]:
    nets = {"generator": ft.functional(pair.generator), "discriminator": ft.functional(pair.discriminator)}
    generate, judge = (apply for _, apply in nets.values())

    def fooled(params: Any, batch: Any) -> Tensor:
        scores = judge(params["discriminator"], generate(params["generator"], batch["z"]))
        return F.softplus(-scores).squeeze(1)

    def told(params: Any, batch: Any) -> Any:
        fake = judge(params["discriminator"], generate(params["generator"], batch["z"]))
        real = judge(params["discriminator"], batch["x"])
        losses = F.softplus(-real) + F.softplus(fake)
        return ft.Losses(losses.squeeze(1), aux={"right": (real > fake).squeeze(1)})

    def grad(loss: Any) -> Any:
        return ft.parallel(ft.grad(loss), parts, how="loop") if parts > 1 else ft.grad(loss)

    step = ft.adversarial(
        {
            "discriminator": (grad(told), ft.optim.adam(rate, b1=0.5)),
            "generator": (grad(fooled), ft.optim.sgd(rate, momentum=0.5)),
        },
        **options,
    )
    return step, {name: params for name, (params, _) in nets.items()}


def points(count: int, size: int = 8, dtype: torch.dtype = F64) -> list[Any]:
    numbers = np.random.default_rng(0)
    batches = [{"x": numbers.normal(size=(size, 2)), "z": numbers.normal(size=(size, 3))} for _ in range(count)]
    return [{name: torch.from_numpy(leaf).to(dtype) for name, leaf in batch.items()} for batch in batches]


def by_torch(pair: Pair, batches: list[Any], rate: float, every: int, simultaneous: bool) -> list[float]:
    """The loop as it is written with torch.optim; leaves its weights in `pair`, gives the generator's losses."""
    generator, discriminator = pair.generator, pair.discriminator
    first = torch.optim.Adam(discriminator.parameters(), lr=rate, betas=(0.5, 0.999))
    second = torch.optim.SGD(generator.parameters(), lr=rate, momentum=0.5)
    measured = []
    for position, batch in enumerate(batches):
        frozen = copy.deepcopy(discriminator)
        first.zero_grad()
        fake = generator(batch["z"]).detach()
        (F.softplus(-discriminator(batch["x"])) + F.softplus(discriminator(fake))).mean().backward()
        first.step()
        second.zero_grad()
        loss = F.softplus(-(frozen if simultaneous else discriminator)(generator(batch["z"]))).mean()
        measured.append(loss.item())
        if (position + 1) % every == 0:
            loss.backward()
            second.step()
    return measured


@pytest.mark.parametrize(("every", "simultaneous", "parts"), [(1, False, 1), (1, True, 1), (3, False, 3)])
def test_a_gan_follows_the_loop_with_two_torch_optimizers(every: int, simultaneous: bool, parts: int) -> None:
    torch.manual_seed(0)
    pair, batches = Pair(), points(20)
    step, params = gan(pair, parts=parts, every={"generator": every}, simultaneous=simultaneous)
    state, losses = step.init(params), []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics["generator.loss"].item())
    assert losses == pytest.approx(by_torch(pair, batches, 1e-2, every, simultaneous), rel=1e-10)
    for name in ("generator", "discriminator"):
        expected = {path: leaf.detach() for path, leaf in getattr(pair, name).named_parameters()}
        equal(name, dict(state.params[name]), expected, 1e-10)


def test_every_player_has_its_own_randomness() -> None:
    def noise(params: Any, batch: Tensor, *, key: Tensor) -> Any:
        return ft.Losses(params["x"] * params["y"] + 0 * batch, aux={"noise": ft.random.uniform(key, (), F64)})

    step = ft.adversarial({"x": (ft.grad(noise), ft.optim.sgd(0.0)), "y": (ft.grad(noise), ft.optim.sgd(0.0))})
    state, metrics = step(step.init(START, seed=5), ONE)
    _, after = step(state, ONE)
    drawn = [row[f"{name}.noise"].item() for row in (metrics, after) for name in "xy"]
    assert len(set(drawn)) == 4
    assert all(0 < value < 1 for value in drawn)


# 0 → 2 · 0 + 1 = 1 → 3 · 1 + 1 = 4 → 9 → 28; where y rests at first, 1 → 3 → 10.
@pytest.mark.parametrize(("options", "expected"), [({}, 28), ({"simultaneous": True}, 28), ({"every": {"y": 2}}, 10)])
def test_one_carry_goes_through_the_players_in_their_order(options: Any, expected: int) -> None:
    def counting(factor: float) -> Any:
        def loss(params: Any, batch: Tensor, *, carry: Tensor) -> Any:
            return batch * params["x"] * params["y"] + 0 * carry, carry * factor + 1

        return loss

    grads = {"x": counting(2.0), "plain": minimise, "y": counting(3.0)}
    players = {name: (ft.grad(loss, of=name), ft.optim.sgd(0.1)) for name, loss in grads.items()}
    step = ft.adversarial(players, **options)
    state = run(step, step.init(START | {"plain": number(0.0)}, carry=number(0.0)), 2)
    assert state.carry.item() == expected


def test_batch_norm_of_a_generator_is_updated_by_both_players() -> None:
    torch.manual_seed(0)
    pair = Pair(norm=True)
    generator, generate = ft.functional(pair.generator)
    discriminator, judge = ft.functional(pair.discriminator)

    def told(params: Any, batch: Any, *, carry: Any) -> Any:
        fake, carry = generate(params["generator"], batch["z"], carry=carry)
        losses = F.softplus(-judge(params["discriminator"], batch["x"])) + F.softplus(judge(params["discriminator"], fake))
        return losses.squeeze(1), carry

    def fooled(params: Any, batch: Any, *, carry: Any) -> Any:
        fake, carry = generate(params["generator"], batch["z"], carry=carry)
        return F.softplus(-judge(params["discriminator"], fake)).squeeze(1), carry

    step = ft.adversarial(
        {
            "discriminator": (ft.grad(told), ft.optim.adam(1e-2, b1=0.5)),
            "generator": (ft.grad(fooled), ft.optim.sgd(1e-2, momentum=0.5)),
        }
    )
    state = step.init({"generator": generator, "discriminator": discriminator}, carry=generate.buffers)
    batches = points(5)
    for batch in batches:
        state, _ = step(state, batch)
    by_torch(pair, batches, 1e-2, 1, simultaneous=False)
    equal("buffers", dict(state.carry), {name: leaf.detach() for name, leaf in pair.generator.named_buffers()}, 1e-10)
    assert state.carry["1.num_batches_tracked"].item() == 10


# --- laws ---------------------------------------------------------------------------------------------------------


SCHEDULED = ft.optim.cosine(1e-2, 10)


@pytest.mark.parametrize("options", [{}, {"simultaneous": True}, {"every": {"generator": 2}}], ids=str)
def test_a_run_resumes_with_the_same_bits(options: Any) -> None:
    torch.manual_seed(0)
    step, params = gan(Pair(), SCHEDULED, **options)
    check_step(step, params, points(4))


def test_a_guard_goes_back_for_all_players() -> None:
    torch.manual_seed(0)
    step, params = gan(Pair())
    good, bad = points(2)
    bad["z"][0, 0] = torch.inf
    state, _ = step(step.init(params), good)
    check_guard(step, state, good, bad)


def test_a_population_of_games_is_each_game_alone() -> None:
    torch.manual_seed(0)
    step, params = gan(Pair(), SCHEDULED, every={"generator": 2})
    alone = step.init(params)
    members = [alone, ft.with_hyper(alone, **{"generator.lr_peak": 0.1})]
    both = ft.population(ft.guard(step))
    state = both.init(members)
    for batch in points(4):
        state, metrics = both(state, batch)
        members, rows = map(list, zip(*(step(member, batch) for member in members)))
    equal("members", ft.tree.unstack(state), members)
    equal("measures", {name: metrics[name] for name in rows[0]}, ft.tree.stack(rows))


def test_compiled_it_is_the_same_and_donates() -> None:
    step = game(SCHEDULED, every={"y": 2})
    fast = ft.compiled(step)
    state, other = step.init(START), fast.init(START)
    for _ in range(5):
        before = other
        (state, metrics), (other, measured) = step(state, ONE), fast(other, ONE)
        equal("compiled", (other, measured), (state, metrics))
    with pytest.raises(ft.DonatedError):
        fast(before, ONE)


def test_it_runs_in_a_fold_that_reads_ahead() -> None:
    torch.manual_seed(0)
    step, params = gan(Pair())
    source = ft.arrays(ft.tree.concat(points(3))).batch(8)
    with ft.prefetch(source, depth=2) as batches:
        *_, (state, _) = ft.fold(step, step.init(params), batches, steps=6)
    same_bits("read ahead", state, [*ft.fold(step, step.init(params), source, steps=6)][-1][0])
    reads: list[int] = []

    def read(row: Any) -> Any:
        reads.append(len(reads))
        return row

    once = ft.arrays(ft.tree.concat(points(3))).map(read).batch(8).deferred()
    same_bits("deferred", [*ft.fold(step, step.init(params), once, steps=6)][-1][0], state)
    # Not once more for every player.
    assert len(reads) == 6 * 8


@pytest.mark.parametrize("optimizer", [ft.optim.sgd(0.3, momentum=0.5), ft.optim.adam(0.1)], ids=["sgd", "adam"])
def test_a_gradient_flows_through_a_whole_game(optimizer: Any) -> None:
    # The game is started with x alone tracked: y is moved by gradients of it all the same.
    def loss(params: Any, batch: Tensor) -> Tensor:
        return batch * torch.sin(params["x"] * params["y"]) + params["x"] ** 2

    def other(params: Any, batch: Tensor) -> Tensor:
        return -loss(params, batch) + params["y"] ** 2

    step = ft.adversarial({"x": (ft.grad(loss), optimizer), "y": (ft.grad(other), optimizer)}, every={"y": 2})
    fresh = step.init(START)

    def after(x: Tensor, batch: Tensor) -> Tensor:
        state = run(step, fresh._replace(params={**fresh.params, "x": x}), 4, batch)
        return torch.stack([state.params["x"], state.params["y"]])

    x, batch = number(1.0).requires_grad_(), torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (x, batch))
    by_transform = torch.func.jacrev(after)(x.detach(), batch.detach())
    equal("by transform", by_transform, torch.autograd.functional.jacobian(lambda x: after(x, batch.detach()), x.detach()))

    unrolled = ft.unroll(step, 4)

    def end(x: Tensor, rate: Tensor) -> Tensor:
        state = ft.with_hyper(unrolled.init({**START, "x": x}), **{"y.lr": rate})
        return unrolled(state, batch.detach().expand(4, 2))[0].params["x"]

    assert torch.autograd.gradcheck(end, (x, number(0.2).requires_grad_()))


def test_explain_tells_who_moves_what() -> None:
    torch.manual_seed(0)
    step, _ = gan(Pair(), every={"generator": 5})
    told = str(ft.explain(step))
    for text in ("one after the other", "player generator", "moves: 'generator'", "every: 5 positions", "adam", "sgd"):
        assert text in told
    assert "all at once" in str(ft.explain(game(simultaneous=True)))


# --- bad input ----------------------------------------------------------------------------------------------------


PAIR = (ft.grad(minimise), ft.optim.sgd(0.1))


class Own:
    """A gradient of somebody's own, which cannot be made one of an entry."""

    uses: frozenset[str] = frozenset()
    lanes, reduce = False, ft.reduce.mean

    def __call__(self, params: Any, batch: Any, **_: Any) -> Any:
        return ft.grad(minimise)(params, batch)

    def finished(self, params: Any, batch: Any, **_: Any) -> Any:
        return ft.grad(minimise, of="x").finished(params, batch)


@pytest.mark.parametrize(
    ("players", "options", "message"),
    [
        ([PAIR], {}, "players map names to .*got list"),
        ({}, {}, "there are no players"),
        ({"x": ft.grad(minimise)}, {}, "player 'x' is a pair"),
        ({"x": (ft.grad(minimise),)}, {}, "player 'x' is a pair"),
        ({"x": (minimise, ft.optim.sgd(0.1))}, {}, "player 'x': expected a gradient"),
        ({"x": (ft.grad(minimise), "sgd")}, {}, "player 'x': expected an optimizer"),
        ({"x": (Own(), ft.optim.sgd(0.1))}, {}, r"player 'x': .*is not made of ft.grad\(loss\)"),
        ({"nets.x": PAIR}, {}, "without dots"),
        ({3: PAIR}, {}, "without dots"),
        ({"x": PAIR}, {"every": {"y": 2}}, "'y', which is no player: expected one of 'x'"),
        ({"x": PAIR}, {"every": {"x": 0}}, r"every\['x'\] must be an int of at least 1"),
        ({"x": PAIR}, {"every": {"x": True}}, r"every\['x'\] must be an int of at least 1"),
        ({"x": PAIR}, {"every": 5}, "every maps players to numbers"),
        ({"x": PAIR}, {"simultaneous": 1}, "simultaneous must be True or False"),
    ],
)
def test_bad_players_are_refused_when_the_step_is_made(players: Any, options: Any, message: str) -> None:
    with pytest.raises(ft.ArgumentError, match=message):
        ft.adversarial(players, **options)


def test_a_gradient_that_says_what_it_is_of_may_be_anyones() -> None:
    mine = Own()
    mine.of = "x"  # type: ignore[attr-defined]
    step = ft.adversarial({"x": (mine, ft.optim.sgd(0.1))})
    state, _ = step(step.init(START), ONE)
    assert {name: leaf.item() for name, leaf in state.params.items()} == pytest.approx({"x": 0.95, "y": 0.5})


def test_params_that_do_not_fit_are_refused_at_init() -> None:
    step = game()
    with pytest.raises(ft.TreeError, match="no entry 'y': expected one of 'x', 'z'"):
        step.init({"x": number(1.0), "z": number(1.0)})
    shared = torch.ones(2, dtype=F64)
    with pytest.raises(ft.TreeError, match=r"players 'x' and 'y' would both move the tensor at 'y.b'"):
        step.init({"x": {"a": shared}, "y": {"b": shared.view(2)}})
    overlapping = {"x": PAIR, "all": (ft.grad(maximise, of=("x", "y")), ft.optim.sgd(0.1))}
    with pytest.raises(ft.TreeError, match="players 'x' and 'all' would both move the tensor at 'x'"):
        ft.adversarial(overlapping).init(START)
    halves = torch.ones(2, dtype=F64)
    step.init({"x": halves[0], "y": halves[1]})


def test_states_and_carries_of_another_kind() -> None:
    step = game()
    state = step.init(START)
    with pytest.raises(ft.TreeError, match="population"):
        step(ft.population(step).init([state, state]), ONE)
    with pytest.raises(ft.LossError, match="does not declare it"):
        step(step.init(START, carry=ONE), ONE)

    def growing(params: Any, batch: Tensor, *, carry: Tensor) -> Any:
        return params["x"] * batch, torch.cat([carry, carry])

    resting = ft.adversarial({"x": (ft.grad(growing), ft.optim.sgd(0.1))}, every={"x": 2})
    state = resting.init(START, carry=ONE)
    assert len(run(resting, state, 2).carry) == 6
    flat, spec = ft.tree.flatten(state)
    with pytest.raises(ft.TreeError, match="a player at rest, cannot go back where a step changes shapes: carry was"):
        make_fx(lambda *leaves: ft.tree.leaves(resting(ft.tree.unflatten(spec, leaves), ONE)))(*flat)
    with pytest.raises(ft.ArgumentError, match="not made of a gradient"):
        step.remade(ft.grad(minimise))
