"""The gradient noise scale beside a reducer: against NumPy, against the truth of a known distribution, and in metrics."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import carried_loss, carried_start, net_batch, net_loss, net_params, plain_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.testing import check_reducer, equal, same_bits

MEASURES = ("gradient_norm", "gradient_variance", "noise_scale")
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2)])
FLOATS = st.sampled_from([torch.float32, torch.float64])
NOISY = ft.reduce.with_noise_scale(ft.reduce.mean)
INNER = [ft.reduce.mean, ft.reduce.sum, ft.reduce.and_mask(0.5), ft.reduce.sign_vote, ft.reduce.pcgrad, ft.reduce.adasum]


def linear(params, batch):
    """A loss whose gradients are the batch: ⟨params, x⟩ over all leaves, one for each example."""
    products = ft.tree.map(lambda leaf, x: (leaf * x).reshape(len(x), -1).sum(1), params, batch["x"])
    return functools.reduce(torch.add, ft.tree.leaves(products)), batch["weight"]


@st.composite
def problems(draw):
    """Params, a batch of normal numbers around a mean, with weights, and a number of parts."""
    dtype, size = draw(FLOATS), draw(st.integers(1, 9))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = tuple(torch.tensor(rng.standard_normal((size, *shape)) + 3, dtype=dtype) for shape in shapes)
    weight = torch.tensor(rng.uniform(0.5, 2.0, size), dtype=dtype)
    return tuple(torch.zeros(shape, dtype=dtype) for shape in shapes), {"x": x, "weight": weight}, draw(st.integers(1, 7))


def weighted(x, weight=None):
    return {"x": x, "weight": torch.ones(len(x), dtype=x.dtype) if weight is None else weight}


def over(reducer, parts, how="loop"):
    return ft.parallel(ft.grad(linear), parts, reducer, how=how, workers=2)


def estimates(rows, weight, parts):
    """The formulas in float64: rows (N, P), weight (N,)."""
    cut = np.array_split(np.arange(len(weight)), min(parts, len(weight)))
    sums = np.stack([(rows[place] * weight[place, None]).sum(0) for place in cut])
    weights, total, whole = np.array([weight[place].sum() for place in cut]), sums.sum(0), weight.sum()
    mean_square = total @ total / whole**2
    if len(cut) == 1:
        return {"gradient_norm": math.sqrt(mean_square), "gradient_variance": math.nan, "noise_scale": math.nan}
    variance = ((sums**2).sum(1) / weights).sum() - total @ total / whole
    variance /= len(cut) - 1
    signal = mean_square - variance / whole
    scale = variance / signal if signal > 0 else math.inf
    return {"gradient_norm": math.sqrt(mean_square), "gradient_variance": variance, "noise_scale": scale}


@given(problem=problems())
def test_it_is_the_analysis_of_variance(problem):
    params, batch, parts = problem
    size, dtype = len(batch["weight"]), batch["weight"].dtype
    rows = np.concatenate([leaf.double().reshape(size, -1).numpy() for leaf in batch["x"]], 1)
    expected = estimates(rows, batch["weight"].double().numpy(), parts)
    for how in ("loop", "threads", "vmap"):
        found = over(NOISY, parts, how).finished(params, batch).aux
        assert sorted(found) == sorted(MEASURES)
        for name, value in found.items():
            assert value.dtype == dtype
            assert value.shape == ()
            np.testing.assert_allclose(value, expected[name], rtol=1e-3 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("inner", INNER, ids=repr)
@given(size=st.integers(1, 9), parts=st.integers(1, 6), seed=st.integers(0, 99), dtype=FLOATS)
def test_it_leaves_the_reducer_alone(inner, size, parts, seed, dtype):
    params, batch, key = net_params(seed, dtype), net_batch(size, seed, dtype), ft.random.key(seed)
    plain, noisy = (
        ft.parallel(ft.grad(net_loss), parts, reducer, how="loop").finished(params, batch, key=key)
        for reducer in (inner, ft.reduce.with_noise_scale(inner))
    )
    assert sorted(noisy.aux) == sorted([*MEASURES, "size"])
    same_bits("bit for bit", noisy._replace(aux=noisy.aux["size"]), plain._replace(aux=plain.aux["size"]))


# --- the truth ----------------------------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -1.0, 0.25, 0.0], dtype=torch.float64)
SPREAD = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
VARIANCE, SIGNAL = float(SPREAD.square().sum()), float(MEAN.square().sum())


def many(count, size, parts, weight):
    """The measures of `count` batches of normal gradients with covariance SPREAD² / weight, `(count,)` each, float64."""
    drawn = ft.random.normal(ft.random.key(7), (count, size, 4), torch.float64)
    x = MEAN + SPREAD * drawn / weight.sqrt()[:, None]

    def one(x):
        found = over(NOISY, parts).finished(torch.zeros(4, dtype=torch.float64), weighted(x, weight)).aux
        return tuple(found[name] for name in MEASURES)

    return torch.func.vmap(one)(x)


def errors(samples, truth):
    """How many standard errors the mean of `samples` is from the truth."""
    return float((samples.mean() - truth).abs() / (samples.std() / len(samples) ** 0.5))


@pytest.mark.parametrize(("size", "parts"), [(6, 6), (20, 3), (11, 4), (8, 2)])
@pytest.mark.parametrize("unequal", [False, True])
def test_estimates_average_to_the_truth(size, parts, unequal):
    weight = 0.5 + torch.arange(size, dtype=torch.float64) % 3 if unequal else torch.ones(size, dtype=torch.float64)
    norm, variance, _ = many(4000, size, parts, weight)
    signal = norm.square() - variance / weight.sum()
    assert errors(variance, VARIANCE) < 4
    assert errors(signal, SIGNAL) < 4
    # Had the squared norm of the mean been taken for ‖G‖², it would have been seen.
    assert errors(norm.square(), SIGNAL) > 10


def test_the_noise_scale_of_a_large_batch_is_near_the_truth():
    _, _, scale = many(50, 4000, 200, torch.ones(4000, dtype=torch.float64))
    assert abs(scale.mean() / (VARIANCE / SIGNAL) - 1) < 0.02


def test_small_scatter_around_a_large_gradient_is_seen_in_float32():
    # The textbook difference of two sums of squares has no digit left here: its terms are 10⁸ and 3 · 10⁻³.
    rng = np.random.default_rng(0)
    x = torch.tensor(1000 + 0.01 * rng.standard_normal((32, 3)), dtype=torch.float32)
    found = over(NOISY, 32).finished(torch.zeros(3), weighted(x)).aux
    expected = estimates(x.double().numpy(), np.ones(32), 32)
    np.testing.assert_allclose(found["gradient_variance"], expected["gradient_variance"], rtol=0.01)


# --- where there is nothing to measure ----------------------------------------------------------------------------


def test_one_part_has_no_variance_and_metrics_say_so():
    step = ft.step(ft.parallel(ft.grad(plain_loss), 1, NOISY), ft.optim.sgd(0.1))
    _, metrics = step(step.init(net_params()), net_batch(4))
    assert metrics["gradient_variance"].isnan()
    assert metrics["noise_scale"].isnan()
    assert metrics["gradient_norm"] > 0


def test_noise_that_drowns_the_gradient_is_infinite():
    found = over(NOISY, 2).finished(torch.zeros(1), weighted(torch.tensor([[1.0], [-0.9]]))).aux
    assert found["noise_scale"] == math.inf
    equal("variance", found["gradient_variance"], torch.tensor(1.9**2 / 2))


def test_a_part_without_weight_is_not_counted():
    x = torch.tensor([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0], [7.0, 7.0]])
    for place in range(4):
        weight = torch.ones(4)
        weight[place] = 0
        others = x[weight > 0]
        found = over(NOISY, 4).finished(torch.zeros(2), weighted(x, weight)).aux
        equal(f"without {place}", found, over(NOISY, 3).finished(torch.zeros(2), weighted(others)).aux)
    with pytest.raises(ft.LossError, match="sum to zero"):
        over(NOISY, 4).finished(torch.zeros(2), weighted(x, torch.zeros(4)))


def test_a_nan_shows_in_every_measure():
    found = over(NOISY, 3).finished(torch.zeros(1), weighted(torch.tensor([[1.0], [torch.nan], [2.0]]))).aux
    assert all(value.isnan() for value in found.values())


# --- aux ----------------------------------------------------------------------------------------------------------


def with_aux(aux):
    def loss(params, batch):
        losses, weight = linear(params, batch)
        return ft.Losses(losses, weight, aux=aux(losses))

    return loss


@pytest.mark.parametrize(
    ("aux", "names"),
    [
        (lambda losses: None, []),
        (lambda losses: {}, []),
        (lambda losses: {"mine": losses}, ["mine"]),
        (lambda losses: losses, ["aux"]),
        (lambda losses: (losses, losses), ["aux.0", "aux.1"]),
    ],
)
def test_measures_stand_beside_the_users_own(aux, names):
    x = torch.tensor([[1.0], [2.0], [4.0]])
    step = ft.step(ft.parallel(ft.grad(with_aux(aux)), 3, NOISY), ft.optim.sgd(0.1))
    _, metrics = step(step.init(torch.ones(1)), weighted(x))
    assert sorted(metrics) == sorted(["loss", "weight", *names, *MEASURES])
    for name in names:
        equal(name, metrics[name], x.mean())


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_the_same_name_is_refused(name):
    grad = ft.parallel(ft.grad(with_aux(lambda losses: {name: losses})), 3, NOISY)
    with pytest.raises(ft.LossError, match=f"reports '{name}', and the loss has an aux of that name"):
        grad.finished(torch.ones(1), weighted(torch.ones(3, 1)))


def test_what_cannot_be_measured_is_refused():
    of_examples = dataclasses.replace(ft.reduce.mean, name="clipped", linear=False, scale=torch.ones_like)
    with pytest.raises(ft.ArgumentError, match=r"cannot measure under reduce\.clipped: it scales .* every single example"):
        ft.reduce.with_noise_scale(of_examples)
    with pytest.raises(ft.ArgumentError, match=r"takes a reducer such as ft\.reduce\.mean, got 'mean'"):
        ft.reduce.with_noise_scale("mean")


# --- among the others ---------------------------------------------------------------------------------------------


def test_a_carry_goes_through():
    params, batch = net_params(), net_batch(7)
    plain, noisy = (
        ft.parallel(ft.grad(carried_loss), 3, reducer, how="loop").finished(params, batch, carry=carried_start())
        for reducer in (ft.reduce.mean, NOISY)
    )
    same_bits("carry and grads", noisy._replace(aux=None), plain)
    assert noisy.aux["gradient_variance"] > 0


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_it_is_lawful_and_can_be_traced(inner):
    reducer = ft.reduce.with_noise_scale(inner)
    assert repr(reducer) == f"reduce.with_noise_scale({inner.name})"
    assert reducer.keyed == inner.keyed
    check_reducer(reducer)
    x, key = ft.random.normal(ft.random.key(1), (5, 3)), ft.random.key(2)

    def finished(x, key):
        taken = over(reducer, 3).finished(torch.zeros(3), weighted(x), key=key)
        return taken.grads, *taken.aux.values()

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    graph = make_fx(finished)(fake.from_tensor(-x), fake.from_tensor(ft.random.key(0)))
    equal("traced", tuple(graph(x, key)), finished(x, key))


def test_members_of_a_population_have_measures_of_their_own():
    step = ft.step(ft.parallel(ft.grad(net_loss), 3, ft.reduce.with_noise_scale(ft.reduce.pcgrad)), ft.optim.sgd(0.1))
    starts = [step.init(net_params(seed, torch.float64), seed=seed) for seed in (0, 1)]
    both = ft.population(step)
    _, metrics = both(both.init(starts), net_batch(7, 0, torch.float64))
    for member, start in enumerate(starts):
        _, alone = step(start, net_batch(7, 0, torch.float64))
        for name in MEASURES:
            equal(name, metrics[name][member], alone[name])
