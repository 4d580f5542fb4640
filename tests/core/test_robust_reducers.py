"""Robust reducers: they agree with independent formulas, and stay among the good parts whatever the corrupt ones send."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import net_batch, net_loss, net_params, random_tree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.core.reduce.order import _network, ordered
from functrain.testing import check_reducer, equal, same_bits

MEDIAN, TRIMMED, GEOMETRIC = ft.reduce.median, ft.reduce.trimmed_mean(0.3), ft.reduce.geometric_median()
KRUM, MULTI = ft.reduce.krum(1), ft.reduce.multi_krum(1)
ROBUST = [MEDIAN, TRIMMED, GEOMETRIC, KRUM, MULTI]
SHAPES = {"w": (2, 3), "b": (4,), "scale": ()}
DTYPES = st.sampled_from([torch.float32, torch.float64])


def parts_of(rows, weights=None, loss=0.0):
    """Unfinished gradients of parts whose mean gradients are `rows`."""
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    return [
        ft.Gradient(ft.tree.map(lambda leaf, w=w: leaf * w.to(leaf.dtype), row), torch.tensor(loss), w)
        for row, w in zip(rows, weights)
    ]


def reduced(reducer, rows, weights=None):
    return reducer.finish(ft.tree.tree_reduce(reducer.merge, map(reducer.lift, parts_of(rows, weights)))).grads


def vectors(rows):
    """(K, P) in float64, for formulas."""
    return np.stack([np.concatenate([leaf.double().numpy().reshape(-1) for leaf in ft.tree.leaves(row)]) for row in rows])


def vector(tree):
    return vectors([tree])[0]


def close(got, expected, dtype, scale=1.0):
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype] * max(1.0, scale)
    np.testing.assert_allclose(vector(got), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- the formulas ----------------------------------------------------------------------------------------------------


def by_median(values):
    with np.errstate(invalid="ignore"):
        found = [np.median(kept) if len(kept := column[~np.isnan(column)]) else np.nan for column in values.T]
    return np.where(np.isfinite(found), found, np.nan)


def by_trimming(values, cut):
    """NaNs as extremes: half of them below, half above; where their number is odd, the mean of both ways to halve it."""

    def one(column):
        kept, missing = np.sort(column[~np.isnan(column)]), int(np.isnan(column).sum())
        ways = [
            np.concatenate([np.full(low, -np.inf), kept, np.full(missing - low, np.inf)])
            for low in (missing // 2, missing - missing // 2)
        ]
        with np.errstate(invalid="ignore"):
            return np.mean([way[cut : len(way) - cut].mean() for way in ways])

    found = np.array([one(column) for column in values.T])
    return np.where(np.isfinite(found), found, np.nan)


def by_scores(values, corrupt):
    count = len(values)
    distances = [[np.sum((a - b) ** 2) for b in values] for a in values]
    return np.array([sum(sorted(row[:k] + row[k + 1 :])[: count - corrupt - 2]) for k, row in enumerate(distances)])


HOLES = [0.0, 1.0, np.nan, np.inf, -np.inf]


@given(count=st.integers(1, 9), seed=st.integers(0, 999), dtype=DTYPES, holes=st.lists(st.sampled_from(HOLES), max_size=20))
def test_medians_and_trimmed_means_coordinate_by_coordinate(count, seed, dtype, holes):
    rows = [random_tree(SHAPES, seed + 100 * k, dtype) for k in range(count)]
    for place, hole in enumerate(holes):
        rows[place * 7 % count]["b"][place % 4] = hole
    weights = ft.random.uniform(ft.random.key(seed), (count,)) + 0.5
    close(reduced(MEDIAN, rows, weights), by_median(vectors(rows)), dtype)
    for share in (0, 0.2, 0.34, 0.49):
        close(reduced(ft.reduce.trimmed_mean(share), rows, weights), by_trimming(vectors(rows), int(share * count)), dtype)


@pytest.mark.parametrize(("share", "parts", "cut"), [(0.29, 100, 29), (0.3, 10, 3), (0.49999999999, 10, 4), (0.2, 4, 0)])
def test_the_share_that_is_trimmed_is_rounded_down(share, parts, cut):
    rows = [{"w": torch.tensor([float(k**2)], dtype=torch.float64)} for k in range(parts)]
    close(reduced(ft.reduce.trimmed_mean(share), rows), by_trimming(vectors(rows), cut), torch.float64)


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts_all_zeros_and_ones_and_so_everything(count):
    rows = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count))).T
    expected = rows.sort(0).values
    for first, last in itertools.combinations_with_replacement(range(count), 2):
        assert torch.equal(torch.stack(ordered(rows.unbind(0), first, last)), expected[first : last + 1])
    assert len(_network(count, 0, count - 1)) == [0, 1, 3, 5, 9, 12, 16, 19, 26, 31][count - 1]


@pytest.mark.parametrize("count", [33, 65])
def test_many_parts_are_ordered_alike_whoever_sorts(count):
    rows = [random_tree(SHAPES, seed) for seed in range(count)]
    rows[3]["w"][0, 1] = rows[5]["w"][0, 1] = rows[8]["b"][2] = torch.nan
    close(reduced(MEDIAN, rows), by_median(vectors(rows)), torch.float32)
    close(reduced(TRIMMED, rows), by_trimming(vectors(rows), int(0.3 * count)), torch.float32)


def objective(z, values, weights):
    return float(weights @ np.sqrt(((values - z) ** 2).sum(1)))


@settings(max_examples=10)
@given(count=st.integers(4, 9), seed=st.integers(0, 999))
def test_the_geometric_median_is_where_the_distances_are_least(count, seed):
    rows = [random_tree(SHAPES, seed + 100 * k, torch.float64) for k in range(count)]
    weights = np.asarray(ft.random.uniform(ft.random.key(seed), (count,), torch.float64) + 0.5)
    values = vectors(rows)
    found = scipy.optimize.minimize(objective, weights @ values / weights.sum(), (values, weights), tol=1e-10)
    for steps, gap in ((16, 1e-2), (500, 1e-5)):
        got = vector(reduced(ft.reduce.geometric_median(steps=steps), rows, weights))
        assert objective(got, values, weights) <= found.fun * (1 + gap)


def test_the_geometric_median_of_a_line_and_of_a_square():
    line = [{"w": torch.tensor([x], dtype=torch.float64)} for x in (0.0, 1.0, 100.0)]
    found = reduced(ft.reduce.geometric_median(steps=2000, smoothing=1e-9), line)
    np.testing.assert_allclose(found["w"], [1.0], atol=1e-6)
    # Where all distances are below the smoothing, it is the weighted mean.
    close(reduced(ft.reduce.geometric_median(smoothing=1e6), line, [1, 2, 3]), [302 / 6], torch.float64)
    # A part with more than half of the weight is the median.
    found = reduced(ft.reduce.geometric_median(steps=500), line, [1, 1, 3])
    np.testing.assert_allclose(found["w"], [100.0], atol=1e-4)


@given(count=st.integers(5, 10), seed=st.integers(0, 999), dtype=DTYPES, corrupt=st.integers(0, 3), keep=st.integers(1, 4))
def test_krum_takes_what_scores_least(count, seed, dtype, corrupt, keep):
    rows = [random_tree(SHAPES, seed + 100 * k, dtype) for k in range(count)]
    weights = np.asarray(ft.random.uniform(ft.random.key(seed), (count,), torch.float64) + 0.5)
    if count < 2 * corrupt + 3:
        with pytest.raises(ft.LossError, match=rf"= {2 * corrupt + 3} parts .* there are {count}:"):
            reduced(ft.reduce.krum(corrupt), rows)
        return
    values = vectors(rows)
    order = np.argsort(by_scores(values, corrupt), kind="stable")
    close(reduced(ft.reduce.krum(corrupt), rows, weights), values[order[0]], dtype)
    for chosen, reducer in ((keep, ft.reduce.multi_krum(corrupt, keep)), (count - corrupt, ft.reduce.multi_krum(corrupt))):
        if chosen > count - corrupt:
            continue
        best = order[:chosen]
        close(reduced(reducer, rows, weights), weights[best] @ values[best] / weights[best].sum(), dtype)


def test_of_parts_that_score_alike_krum_takes_the_first():
    rows = [{"w": torch.tensor([x])} for x in (5.0, 1.0, 2.0)]
    assert reduced(ft.reduce.krum(0), rows)["w"] == 1.0
    assert reduced(ft.reduce.krum(0), rows[::-1])["w"] == 2.0


# --- corrupt parts ---------------------------------------------------------------------------------------------------

ATTACKS = {
    "huge": lambda good, where: torch.full_like(good, 1e30),
    "hugely negative": lambda good, where: torch.full_like(good, -3e38),
    "NaN": lambda good, where: torch.full_like(good, torch.nan),
    "infinite": lambda good, where: torch.full_like(good, torch.inf),
    "negatively infinite": lambda good, where: torch.full_like(good, -torch.inf),
    "sign flipped": lambda good, where: -100 * good,
    "zero": lambda good, where: torch.zeros_like(good),
    "mixed": lambda good, where: torch.tensor([torch.nan, torch.inf, -torch.inf, 1e20, -1e20]).to(good)[
        torch.arange(where, where + good.numel()).reshape(good.shape) % 5
    ],
    "one NaN": lambda good, where: torch.where(torch.arange(good.numel()).reshape(good.shape) == where, torch.nan, good),
}


@st.composite
def attacked(draw, most):
    """Parts, of which at most `most(K)` are corrupt, in drawn places: (rows, places of the good ones, seed)."""
    count, seed, dtype = draw(st.integers(5, 11)), draw(st.integers(0, 999)), draw(DTYPES)
    attacks = draw(st.lists(st.sampled_from(sorted(ATTACKS)), min_size=0, max_size=most(count)))
    places = draw(st.permutations(range(count)))
    centre = random_tree(SHAPES, seed, dtype)
    rows = [ft.tree.map(lambda c, d: c + 0.3 * d, centre, random_tree(SHAPES, seed + 31 * k + 1, dtype)) for k in range(count)]
    for attack, place in zip(attacks, places):
        rows[place] = ft.tree.map(lambda leaf, attack=attack, place=place: ATTACKS[attack](leaf, place), rows[place])
    return rows, sorted(places[len(attacks) :]), seed


def within(got, good, slack):
    low, high = good.min(0), good.max(0)
    margin = slack * (1 + np.abs(good).max())
    assert ((got >= low - margin) & (got <= high + margin)).all(), (got, low, high)


@settings(max_examples=60)
@given(attacked(lambda count: (count - 1) // 2))
def test_the_median_survives_less_than_half(case):
    rows, good, _ = case
    within(vector(reduced(MEDIAN, rows)), vectors(rows)[good], 1e-6)


@settings(max_examples=60)
@given(attacked(lambda count: int(0.3 * count + 1e-9)))
def test_the_trimmed_mean_survives_what_it_drops(case):
    rows, good, _ = case
    within(vector(reduced(TRIMMED, rows)), vectors(rows)[good], 1e-6)


@settings(max_examples=60)
@given(attacked(lambda count: (count - 1) // 2))
def test_the_geometric_median_survives_less_than_half_of_the_weight(case):
    rows, good, seed = case
    # Weights such that less than half is corrupt: at most half of the parts and the lighter ones.
    weights = np.array([1.0 + (k in good) * (seed % 3) for k in range(len(rows))])
    values, got = vectors(rows)[good], vector(reduced(GEOMETRIC, rows, weights))
    centre = values.mean(0)
    radius = np.sqrt(((values - centre) ** 2).sum(1)).max()
    alpha = 1 - weights[good].sum() / weights.sum()
    assert np.linalg.norm(got - centre) <= 2 * (1 - alpha) / (1 - 2 * alpha) * radius * (1 + 1e-6)


@settings(max_examples=60)
@given(attacked(lambda count: (count - 3) // 2), st.data())
def test_krum_survives_as_many_as_it_is_told(case, data):
    rows, good, _ = case
    corrupt = data.draw(st.integers(len(rows) - len(good), (len(rows) - 3) // 2))
    values = vectors(rows)[good]
    got = vector(reduced(ft.reduce.krum(corrupt), rows))
    everyone = vectors(rows)
    assert min(np.abs(row - got).max() for row in everyone if np.isfinite(row).all()) <= 1e-6 * np.abs(got).max()
    # A score is at most (K − f − 2) D² for D between good parts, and has a good part among those that it counts.
    diameter = max(np.linalg.norm(a - b) for a in values for b in values)
    reach = diameter * math.sqrt(len(rows) - corrupt - 2) * (1 + 1e-6)
    assert min(np.linalg.norm(got - value) for value in values) <= reach
    mean = vector(reduced(ft.reduce.multi_krum(corrupt), rows))
    assert min(np.linalg.norm(mean - value) for value in values) <= reach + diameter


@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
@pytest.mark.parametrize("attack", ["NaN", "infinite", "negatively infinite"])
def test_of_parts_that_are_all_not_finite_nothing_is_made_up(reducer, attack):
    rows = [ft.tree.map(lambda leaf: ATTACKS[attack](leaf, 0), random_tree(SHAPES, k)) for k in range(6)]
    assert np.isnan(vector(reduced(reducer, rows))).all()


def test_too_many_corrupt_parts_are_seen_not_hidden():
    good, bad = random_tree(SHAPES, 1), ft.tree.map(lambda leaf: leaf * torch.inf, random_tree(SHAPES, 2))
    rows = [good] * 2 + [bad] * 4
    for reducer in (MEDIAN, TRIMMED, KRUM, MULTI):
        assert np.isnan(vector(reduced(reducer, rows))).all()
    equal("weight zero, however many", reduced(GEOMETRIC, rows), good)


def test_missing_values_push_to_neither_side():
    # Three of eight parts hold NaN: what is left is symmetric around zero.
    rows = [{"w": torch.full((1,), value)} for value in (torch.nan, -2.0, torch.nan, -1.0, 0.0, 1.0, torch.nan, 2.0)]
    for reducer in (MEDIAN, TRIMMED, GEOMETRIC):
        assert abs(reduced(reducer, rows)["w"].item()) < 1e-6


# --- dtypes, shapes, plans, transforms, graphs -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
def test_dtypes_and_shapes_are_those_of_the_params(reducer, dtype):
    shapes = {"a": (3, 2), "scalar": (), "none": (0, 4)}
    rows = [random_tree(shapes, k, dtype) | {"double": random_tree((2,), k + 50, torch.float64)} for k in range(7)]
    rows[2]["a"][1] = torch.nan
    got = reduced(reducer, rows)
    expected = reduced(reducer, [ft.tree.map(torch.Tensor.double, row) for row in rows])
    for path, leaf in ft.tree.named(got).items():
        assert (leaf.shape, leaf.dtype) == (rows[0][path].shape, rows[0][path].dtype)
        torch.testing.assert_close(leaf.double(), expected[path], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
def test_large_leaves_in_blocks_and_transposed(reducer):
    shapes = {"large": (3, 50_000), "edge": (1 << 15,), "small": (5,)}
    rows = [random_tree(shapes, 11 * k, torch.float64) for k in range(5)]
    rows[1]["large"][1, 20_000] = rows[4]["edge"][-1] = torch.nan
    turned = [row | {"large": row["large"].T.contiguous().T} for row in rows]
    assert not turned[0]["large"].is_contiguous()
    same_bits("strides", reduced(reducer, turned), reduced(reducer, rows))
    values, got = vectors(rows), vector(reduced(reducer, rows))
    # The edges of blocks, places here and there, and those of the NaNs.
    missing = np.isnan(values).any(0).nonzero()[0]
    some = np.unique(np.r_[[0, (1 << 15) - 1, 1 << 15], np.arange(7, values.shape[1], 997), missing])
    if reducer in (MEDIAN, TRIMMED):
        expected = by_median(values[:, some]) if reducer is MEDIAN else by_trimming(values[:, some], 1)
        np.testing.assert_allclose(got[some], expected, rtol=1e-12)
    elif reducer is KRUM:
        finite = [0, 2, 3]
        scores = [sum(((values[k] - values[j]) ** 2).sum() for j in finite) for k in finite]
        np.testing.assert_array_equal(got, values[finite[int(np.argmin(scores))]])
    elif reducer is GEOMETRIC:
        finite = values[[0, 2, 3]]
        pulls = [(got - row) / np.linalg.norm(got - row) for row in finite]
        assert np.linalg.norm(sum(pulls)) < 1e-3


@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
def test_robust_reducers_are_lawful(reducer):
    check_reducer(reducer)


def poisoned(size=21, dtype=torch.float64):
    batch = net_batch(size, 3, dtype)
    batch["x"][3:6] = torch.nan
    return batch


@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
def test_every_plan_survives_a_corrupt_part(reducer):
    params, batch = net_params(1, torch.float64), poisoned()
    plans = {how: ft.parallel(ft.grad(net_loss), 7, reducer, how=how, workers=2) for how in ("loop", "threads", "vmap")}
    results = {how: plan.finished(params, batch).grads for how, plan in plans.items()}
    assert np.isfinite(vector(results["loop"])).all()
    same_bits("threads", results["threads"], results["loop"])
    equal("vmap", results["vmap"], results["loop"])


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
def test_robust_reducers_nest_under_transforms(reducer, poison):
    params, batch = net_params(1, torch.float64), poisoned() if poison else net_batch(21, 3, torch.float64)
    grad = ft.parallel(ft.grad(net_loss), 7, reducer, how="loop")
    leaves, spec = ft.tree.flatten(params)

    def size(*leaves):
        taken = grad.finished(ft.tree.unflatten(spec, leaves), batch).grads
        return sum(leaf.square().sum() for leaf in ft.tree.leaves(taken))

    stacked = [torch.stack([leaf, 2 * leaf]) for leaf in leaves]
    both = torch.func.vmap(size)(*stacked)
    equal("vmap", both, torch.stack([size(*leaves), size(*(2 * leaf for leaf in leaves))]))
    if poison:
        return
    direction = [ft.random.normal(ft.random.key(n), leaf.shape, leaf.dtype) for n, leaf in enumerate(leaves)]
    outer = torch.func.grad(size, argnums=tuple(range(len(leaves))))(*leaves)
    slope = sum((a * b).sum() for a, b in zip(outer, direction))
    ahead, behind = (size(*(leaf + step * d for leaf, d in zip(leaves, direction))) for step in (1e-6, -1e-6))
    equal("func.grad is the slope", slope, (ahead - behind) / 2e-6, 1e-5)
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    equal("autograd", list(torch.autograd.grad(size(*tracked), tracked)), list(outer))


@pytest.mark.parametrize("reducer", ROBUST, ids=repr)
def test_robust_reducers_are_graphs(reducer):
    params = net_params(1, torch.float64)
    grad = ft.parallel(ft.grad(net_loss), 5, reducer, how="loop")
    flat, spec = ft.tree.flatten((params, poisoned(15)))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = make_fx(lambda *leaves: ft.tree.leaves(grad.finished(*ft.tree.unflatten(spec, leaves)).grads))(
        *map(mode.from_tensor, flat)
    )
    # On tensors without values nothing was decided by a value: the graph holds for clean parts and for corrupt ones.
    for batch in (poisoned(15), net_batch(15, 3, torch.float64)):
        expected = grad.finished(params, batch).grads
        equal("graph", ft.tree.unflatten(ft.tree.structure(params), graph(*ft.tree.leaves((params, batch)))), expected)


def test_a_compiled_step_survives_a_corrupt_part():
    params, batch = {"w": torch.tensor([0.5, -1.0])}, {"x": random_tree((6, 2), 1), "y": random_tree((6,), 2)}
    batch["x"][2:4] = torch.nan
    grad = ft.parallel(ft.grad(lambda p, b: (b["x"] @ p["w"] - b["y"]) ** 2), 3, reduce=ft.reduce.median)
    step = ft.step(grad, ft.optim.sgd(0.1))
    compiled = ft.compiled(step, donate=False)
    got, _ = compiled(compiled.init(params), batch)
    assert np.isfinite(vector(got.params)).all()
    equal("compiled", got.params, step(step.init(params), batch)[0].params)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda s=s: ft.reduce.trimmed_mean(s), r"number in \[0, 0.5\), got") for s in (0.5, -0.1, math.nan, True, "0.2")),
        *((lambda n=n: ft.reduce.geometric_median(steps=n), "steps.*at least 1, got") for n in (0, -1, 2.0, True)),
        *((lambda v=v: ft.reduce.geometric_median(smoothing=v), "above 0, got") for v in (0, -1e-6, math.inf, math.nan, True)),
        *((lambda f=f: ft.reduce.krum(f), r"krum\(corrupt\).*at least 0, got") for f in (-1, 1.0, True, "1")),
        *((lambda f=f: ft.reduce.multi_krum(f), r"multi_krum\(corrupt\).*at least 0, got") for f in (-1, 0.5, False)),
        *((lambda m=m: ft.reduce.multi_krum(1, keep=m), "keep.*at least 1") for m in (0, -2, 1.5, True)),
    ],
)
def test_numbers_that_robust_reducers_refuse(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_parts_that_robust_reducers_refuse():
    rows = [random_tree(SHAPES, k) for k in range(6)]
    with pytest.raises(ft.LossError, match=r"krum\(2\) needs at least 2 · 2 \+ 3 = 7 parts to tell 2 corrupt .* there are 6"):
        reduced(ft.reduce.krum(2), rows)
    with pytest.raises(ft.LossError, match=r"multi_krum\(1, keep=6\) keeps 6 of 6 parts.*keep at most 5"):
        reduced(ft.reduce.multi_krum(1, keep=6), rows)
    for reducer in ROBUST:
        with pytest.raises(ft.LossError, match="part 2 of 6 sum to zero"):
            reduced(reducer, rows, [1, 0, 1, 1, 1, 1])
