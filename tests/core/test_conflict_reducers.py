"""Reducers for gradients that conflict: PCGrad and Adasum, against NumPy, over drawn trees, sizes, weights and dtypes."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.core.reduce.base import own_key
from functrain.testing import check_reducer, equal, same_bits

UNFUSED = ("loop", "threads", "vmap")
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2)])
FLOATS = st.sampled_from([torch.float32, torch.float64])
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def linear(params, batch):
    """A loss whose gradients are the batch: ⟨params, x⟩ over all leaves, one for each example."""
    products = ft.tree.map(lambda leaf, x: (leaf * x).reshape(len(x), -1).sum(1), params, batch["x"])
    return functools.reduce(torch.add, ft.tree.leaves(products)), batch["weight"]


@st.composite
def problems(draw, most=7):
    """Params, a batch of normal numbers with weights, and a number of parts."""
    dtype, size = draw(FLOATS), draw(st.integers(1, 9))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = tuple(torch.tensor(rng.standard_normal((size, *shape)), dtype=dtype) for shape in shapes)
    weight = torch.tensor(rng.uniform(0.5, 2.0, size), dtype=dtype)
    params = tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)
    return params, {"x": x, "weight": weight}, draw(st.integers(1, most))


def weighted(x, weight=None):
    return {"x": x, "weight": torch.ones(len(x), dtype=x.dtype) if weight is None else weight}


def over(reducer, parts, how="loop"):
    return ft.parallel(ft.grad(linear), parts, reducer, how=how, workers=2)


def flat(leaves, rows):
    """Leaves (rows, …) as one NumPy matrix (rows, P), float64."""
    return np.concatenate([leaf.double().reshape(rows, -1).numpy() for leaf in ft.tree.leaves(leaves)], 1)


def part_means(batch, parts):
    """The mean gradient of each part, (K, P)."""
    weight = batch["weight"].double().numpy()
    cut = np.array_split(np.arange(len(weight)), min(parts, len(weight)))
    rows = flat(batch["x"], len(weight))
    return np.stack([np.average(rows[place], axis=0, weights=weight[place]) for place in cut])


def check_close(got, expected, dtype):
    assert {leaf.dtype for leaf in ft.tree.leaves(got)} == {dtype}
    np.testing.assert_allclose(flat(got, 1)[0], expected, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(expected).max()))


# --- PCGrad -------------------------------------------------------------------------------------------------------


def surgery(rows, task, order):
    """The paper's inner loop on vectors: task's gradient, projected off each other one in turn."""
    vector = rows[task]
    for other in order:
        if other != task and vector @ rows[other] < 0:
            vector = vector - (vector @ rows[other]) / (rows[other] @ rows[other]) * rows[other]
    return vector


def drawn_orders(key, count):
    return ft.random.uniform(own_key(key), (count, count), torch.float64).numpy().argsort(axis=1)


@given(problem=problems(), seed=st.integers(0, 99))
def test_pcgrad_is_the_papers_loop(problem, seed):
    params, batch, parts = problem
    rows, key = part_means(batch, parts), ft.random.key(seed)
    expected = np.mean([surgery(rows, task, order) for task, order in enumerate(drawn_orders(key, len(rows)))], 0)
    taken = over(ft.reduce.pcgrad, parts).finished(params, batch, key=key)
    check_close(taken.grads, expected, batch["weight"].dtype)


@given(problem=problems(most=3), seed=st.integers(0, 99))
def test_pcgrad_is_the_paper_in_some_order(problem, seed):
    params, batch, parts = problem
    rows, key = part_means(batch, parts), ft.random.key(seed)
    orders = list(itertools.permutations(range(len(rows))))
    each = [[surgery(rows, task, order) for order in orders] for task in range(len(rows))]
    possible = [np.mean(choice, 0) for choice in itertools.product(*each)]
    got = flat(over(ft.reduce.pcgrad, parts).finished(params, batch, key=key).grads, 1)[0]
    assert min(np.abs(got - one).max() for one in possible) < TOLERANCE[batch["weight"].dtype]


@given(problem=problems(), seed=st.integers(0, 99))
def test_without_conflict_pcgrad_is_the_mean_over_tasks(problem, seed):
    params, batch, parts = problem
    positive = batch | {"x": ft.tree.map(torch.abs, batch["x"])}
    taken = over(ft.reduce.pcgrad, parts).finished(params, positive, key=ft.random.key(seed))
    check_close(taken.grads, part_means(positive, parts).mean(0), batch["weight"].dtype)


def test_two_tasks_are_not_at_odds_with_the_result():
    x = ft.random.normal(ft.random.key(0), (2, 5), torch.float64)
    x[1] -= x[0]
    assert x[0] @ x[1] < 0
    taken = over(ft.reduce.pcgrad, 2).finished(torch.zeros(5, dtype=torch.float64), weighted(x), key=ft.random.key(0))
    assert (x @ taken.grads > 0).all()


@pytest.mark.parametrize("others", [[], [[0.0, 0.0]], [[-1.0, -2.0]], [[1.0, 2.0], [0.0, 0.0], [-1.0, -2.0]]])
def test_pcgrad_of_nothing_opposites_and_twins_is_finite(others):
    x = torch.tensor([[1.0, 2.0], *others])
    taken = over(ft.reduce.pcgrad, len(x)).finished(torch.zeros(2), weighted(x), key=ft.random.key(1)).grads
    same_bits("cancelled or kept", taken, torch.zeros(2) if [-1.0, -2.0] in others else x.mean(0))


# Three tasks, each two of them in conflict, in three dimensions: the order matters.
TRIANGLE = torch.tensor([[1.0, 0.0, 0.3], [-0.6, 0.9, 0.1], [-0.5, -0.8, 0.4]], dtype=torch.float64)


def surgery_step(how="auto"):
    return ft.step(ft.parallel(ft.grad(linear), 3, reduce=ft.reduce.pcgrad, how=how), ft.optim.sgd(0.1))


def positions(seed, count=12, step=None):
    step = step or surgery_step()
    state = step.init(torch.zeros(3, dtype=torch.float64), seed=seed)
    points = [state.params]
    for _ in range(count):
        state, _ = step(state, weighted(TRIANGLE))
        points.append(state.params)
    return torch.stack(points)


def test_each_position_of_a_run_has_its_own_order_and_runs_repeat():
    points = positions(0)
    updates = (points[:-1] - points[1:]) / 0.1
    different = {tuple(update.mul(1e6).round().tolist()) for update in updates}
    assert len(different) > 2
    rows = TRIANGLE.numpy()
    for position, update in enumerate(updates):
        orders = drawn_orders(ft.random.fold_in(ft.random.key(0), position), 3)
        expected = np.mean([surgery(rows, task, order) for task, order in enumerate(orders)], 0)
        np.testing.assert_allclose(update.numpy(), expected, atol=1e-9)
    same_bits("again", positions(0), points)
    same_bits("threads", positions(0, step=surgery_step("threads")), points)
    assert not torch.equal(positions(1), points)


def test_a_population_has_an_order_for_each_member():
    step = surgery_step("loop")
    both = ft.population(step)
    start = [step.init(torch.zeros(3, dtype=torch.float64), seed=seed) for seed in (0, 1)]
    states = both.init(start)
    for _ in range(4):
        states, _ = both(states, weighted(TRIANGLE))
    for seed, member in enumerate(ft.tree.unstack(states)):
        equal("alone", member.params, positions(seed, 4)[-1])


def test_pcgrad_needs_a_key():
    grad = over(ft.reduce.pcgrad, 3)
    assert "key" in grad.uses
    with pytest.raises(ft.LossError, match=r"key=ft\.random\.key\(seed\)"):
        grad.finished(torch.zeros(3, dtype=torch.float64), weighted(TRIANGLE))


# --- Adasum -------------------------------------------------------------------------------------------------------


def folded(rows):
    """Adasum of rows (K, P), split where the one tree is: the largest power of two that leaves something."""
    if len(rows) == 1:
        return rows[0]
    left = 1
    while 2 * left < len(rows):
        left *= 2
    a, b = folded(rows[:left]), folded(rows[left:])
    return (1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b


@given(problem=problems())
def test_adasum_is_the_formula_up_the_tree(problem):
    params, batch, parts = problem
    taken = over(ft.reduce.adasum, parts).finished(params, batch)
    check_close(taken.grads, folded(part_means(batch, parts)), batch["weight"].dtype)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_adasum_adds_orthogonal_gradients_and_averages_equal_ones(parts):
    zeros = torch.zeros(parts)
    same_bits("sum", over(ft.reduce.adasum, parts).finished(zeros, weighted(torch.eye(parts))).grads, torch.ones(parts))
    equal_ones = weighted(torch.arange(1.0, parts + 1).expand(parts, parts))
    equal("mean", over(ft.reduce.adasum, parts).finished(zeros, equal_ones).grads, torch.arange(1.0, parts + 1))


def test_a_zero_gradient_is_neutral_in_adasum():
    pair = torch.tensor([[1.0, 2.0], [-0.5, 1.0]])
    expected = over(ft.reduce.adasum, 2).finished(torch.zeros(2), weighted(pair)).grads
    padded = weighted(torch.stack([pair[0], torch.zeros(2), torch.zeros(2), pair[1], torch.zeros(2)]))
    same_bits("zeros", over(ft.reduce.adasum, 5).finished(torch.zeros(2), padded).grads, expected)
    nothing = over(ft.reduce.adasum, 3).finished(torch.zeros(2), weighted(torch.zeros(3, 2)))
    same_bits("all zero", nothing.grads, torch.zeros(2))
    opposite = weighted(torch.stack([pair[0], -pair[0]]))
    same_bits("opposite", over(ft.reduce.adasum, 2).finished(torch.zeros(2), opposite).grads, torch.zeros(2))


# --- both ---------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("reducer", [ft.reduce.pcgrad, ft.reduce.adasum], ids=repr)


@BOTH
@given(problem=problems())
def test_plans_agree_and_loss_and_weight_are_those_of_the_mean(reducer, problem):
    params, batch, parts = problem
    key = ft.random.key(0)
    mean = over(ft.reduce.mean, parts).finished(params, batch)
    loop, *others = [over(reducer, parts, how).finished(params, batch, key=key) for how in UNFUSED]
    same_bits("beside the gradients", loop._replace(grads=mean.grads), mean)
    for how, other in zip(UNFUSED[1:], others):
        equal(how, other, loop)


@BOTH
def test_a_part_without_weight_is_named(reducer):
    batch = weighted(TRIANGLE, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    with pytest.raises(ft.LossError, match="the weights of part 2 of 3 sum to zero"):
        over(reducer, 3).finished(torch.zeros(3, dtype=torch.float64), batch, key=ft.random.key(0))


@BOTH
def test_a_nan_is_not_hidden(reducer):
    x = TRIANGLE.clone()
    x[1, 1] = torch.nan
    taken = over(reducer, 3).finished(torch.zeros(3, dtype=torch.float64), weighted(x), key=ft.random.key(0))
    assert taken.grads[1].isnan()


@BOTH
def test_low_precision_is_near_and_keeps_its_dtype(reducer):
    exact, key = over(reducer, 3), ft.random.key(0)
    expected = exact.finished(torch.zeros(3, dtype=torch.float64), weighted(TRIANGLE), key=key).grads
    low = exact.finished(torch.zeros(3, dtype=torch.bfloat16), weighted(TRIANGLE.bfloat16()), key=key).grads
    assert low.dtype == torch.bfloat16
    equal("bfloat16", low, expected.bfloat16())


@BOTH
def test_it_is_lawful_and_can_be_traced(reducer):
    check_reducer(reducer)

    def finished(x, weight, key):
        params = torch.zeros(3, dtype=torch.float64)
        return over(reducer, 3).finished(params, {"x": x, "weight": weight}, key=key).grads

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given, key = (-TRIANGLE, torch.ones(3, dtype=torch.float64)), ft.random.key(5)
    graph = make_fx(finished)(*map(fake.from_tensor, (TRIANGLE, given[1], ft.random.key(0))))
    equal("traced", graph(*given, key), finished(*given, key))


@BOTH
def test_params_without_numbers_are_taken_too(reducer):
    params = {"w": torch.zeros(3, dtype=torch.float64), "none": torch.zeros(0, 2, dtype=torch.float64)}
    batch = weighted({"w": TRIANGLE, "none": torch.zeros(3, 0, 2, dtype=torch.float64)}, torch.ones(3, dtype=torch.float64))
    taken = over(reducer, 3).finished(params, batch, key=ft.random.key(0))
    alone = over(reducer, 3).finished(params["w"], weighted(TRIANGLE), key=ft.random.key(0))
    same_bits("w", taken.grads["w"], alone.grads)
    assert taken.grads["none"].shape == (0, 2)
