"""Reducers that count signs: the AND-mask and the majority vote, against NumPy, over drawn trees, sizes, weights and dtypes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.testing import check_reducer, equal, same_bits

UNFUSED = ("loop", "threads", "vmap")
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2)])
FLOATS = st.sampled_from([torch.float32, torch.float64])
PARITY = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])


def linear(params, batch):
    """A loss whose gradients are the batch: ⟨params, x⟩ over all leaves, one for each example."""
    products = ft.tree.map(lambda leaf, x: (leaf * x).reshape(len(x), -1).sum(1), params, batch["x"])
    return functools.reduce(torch.add, ft.tree.leaves(products)), batch["weight"]


@st.composite
def problems(draw):
    """Params, a batch of small integers with halves as weights, and a number of parts: sums are exact, signs tie."""
    dtype, size = draw(FLOATS), draw(st.integers(1, 9))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = tuple(torch.tensor(rng.integers(-2, 3, (size, *shape)), dtype=dtype) for shape in shapes)
    weight = torch.tensor(rng.integers(1, 5, size) / 2, dtype=dtype)
    params = tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)
    return params, {"x": x, "weight": weight}, draw(st.integers(1, 6))


def weighted(x, weight=None):
    return {"x": x, "weight": torch.ones(len(x), dtype=x.dtype) if weight is None else weight}


def over(reducer, parts, how="loop"):
    return ft.parallel(ft.grad(linear), parts, reducer, how=how, workers=2)


def flat(leaves, rows):
    """Leaves (rows, …) as one NumPy matrix (rows, P), float64."""
    return np.concatenate([leaf.double().reshape(rows, -1).numpy() for leaf in ft.tree.leaves(leaves)], 1)


def part_sums(batch, parts):
    weight = batch["weight"].double().numpy()
    rows = flat(batch["x"], len(weight)) * weight[:, None]
    return np.stack([part.sum(0) for part in np.array_split(rows, min(parts, len(rows)))]), weight.sum()


@given(problem=problems(), tau=st.one_of(st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.6, 1.0]), st.floats(0, 1)))
def test_and_mask_is_the_mean_where_signs_agree(problem, tau):
    params, batch, parts = problem
    sums, weight = part_sums(batch, parts)
    agreement = np.float32(np.abs(np.sign(sums).sum(0)) / len(sums))
    expected = np.where(agreement >= np.float32(tau), sums.sum(0) / weight, 0.0)
    taken = over(ft.reduce.and_mask(tau), parts).finished(params, batch)
    assert [leaf.dtype for leaf in taken.grads] == [leaf.dtype for leaf in params]
    np.testing.assert_allclose(flat(taken.grads, 1)[0], expected, rtol=1e-6, atol=0)


@given(problem=problems())
def test_sign_vote_is_the_sign_of_the_sum_of_signs(problem):
    params, batch, parts = problem
    sums, _ = part_sums(batch, parts)
    taken = over(ft.reduce.sign_vote, parts).finished(params, batch)
    assert [leaf.dtype for leaf in taken.grads] == [leaf.dtype for leaf in params]
    np.testing.assert_array_equal(flat(taken.grads, 1)[0], np.sign(np.sign(sums).sum(0)))


@given(problem=problems())
def test_loss_and_weight_are_those_of_the_mean_and_plans_agree(problem):
    params, batch, parts = problem
    mean = over(ft.reduce.mean, parts).finished(params, batch)
    for reducer in (ft.reduce.and_mask(0.5), ft.reduce.sign_vote):
        loop, *others = [over(reducer, parts, how).finished(params, batch) for how in UNFUSED]
        same_bits("beside the gradients", loop._replace(grads=mean.grads), mean)
        for other in others:
            # Whole numbers: there is nothing to round.
            same_bits(repr(reducer), other, loop)


@pytest.mark.parametrize("how", ["auto", *UNFUSED])
@pytest.mark.parametrize(("tau", "expected"), [(0.5, [1.0, 0.0, -1.0]), (0, [1.0, 1 / 3, -1.0]), (1, [1.0, 0.0, -1.0])])
def test_the_numbers_of_the_reference(how, tau, expected):
    taken = over(ft.reduce.and_mask(tau), 3, how).finished(torch.zeros(3), weighted(PARITY))
    same_bits("parity", taken.grads, torch.tensor(expected))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 10, 20])
def test_an_agreement_of_exactly_tau_is_enough(parts):
    # Coordinate c has c votes for and the others against.
    batch = torch.where(torch.arange(parts)[:, None] < torch.arange(parts + 1), 1.0, -1.0)
    agreement = np.abs(2 * np.arange(parts + 1) - parts) / parts
    mean = over(ft.reduce.mean, parts).finished(torch.zeros(parts + 1), weighted(batch)).grads
    for tau in set(agreement):
        kept = over(ft.reduce.and_mask(float(tau)), parts).finished(torch.zeros(parts + 1), weighted(batch)).grads
        equal(f"tau {tau}", kept, torch.where(torch.tensor(agreement >= tau), mean, torch.zeros(())))


def test_votes_are_counted_exactly_whatever_the_dtype():
    # bfloat16 knows no 297 (it would count 296, and agree by less than 1), and 256 + 1 is 256 in it.
    ones = torch.ones(297, 1, dtype=torch.bfloat16)
    taken = over(ft.reduce.and_mask(1), 297).finished(torch.zeros(1, dtype=torch.bfloat16), weighted(ones))
    assert taken.grads.dtype == torch.bfloat16
    assert abs(taken.grads.item() - 1) < 0.05
    vote = ft.reduce.sign_vote

    def lifted(sign):
        grads = torch.full((1,), sign, dtype=torch.bfloat16)
        return vote.lift(ft.Gradient(grads, torch.zeros(()), torch.ones((), dtype=torch.float64)))

    total = functools.reduce(vote.merge, [lifted(1.0)] * 257 + [lifted(-1.0)] * 256)
    same_bits("257 against 256", vote.finish(total).grads, torch.ones(1, dtype=torch.bfloat16))


def test_a_nan_is_no_vote():
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[nan, nan, inf, 1.0, 2.0], [1.0, 1.0, -1.0, 1.0, 2.0], [1.0, -1.0, -1.0, -1.0, 2.0]])
    votes = over(ft.reduce.sign_vote, 3).finished(torch.zeros(5), weighted(x))
    same_bits("votes", votes.grads, torch.tensor([1.0, 0.0, -1.0, 1.0, 1.0]))
    # The mask does not hide what is not finite: not where parts agree (the first), nor where they do not.
    masked = over(ft.reduce.and_mask(0.5), 3).finished(torch.zeros(5), weighted(x))
    same_bits("mean", masked.grads, torch.tensor([nan, nan, nan, 0.0, 2.0]))
    lifted = ft.reduce.and_mask(0.5).lift(ft.grad(linear)(torch.zeros(5), weighted(x[:1])))
    same_bits("lifted", lifted.votes, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("reducer", [ft.reduce.and_mask(1), ft.reduce.sign_vote], ids=repr)
def test_a_part_without_weight_does_not_vote(reducer):
    x = torch.cat([PARITY, torch.full((1, 3), 5.0)])
    silent = over(reducer, 4).finished(torch.zeros(3), weighted(x, torch.tensor([1.0, 1.0, 1.0, 0.0])))
    same_bits("three parts", silent, over(reducer, 3).finished(torch.zeros(3), weighted(PARITY)))
    with pytest.raises(ft.LossError, match="sum to zero"):
        over(reducer, 4).finished(torch.zeros(3), weighted(x, torch.zeros(4)))


def test_a_minority_of_corrupt_parts_does_not_turn_the_vote():
    honest = ft.random.normal(ft.random.key(0), (5, 40)) * 0.1 + torch.where(torch.arange(40) % 3 == 0, -1.0, 1.0)
    x = torch.cat([honest, -1e30 * honest[:3], torch.full((1, 40), torch.nan)])
    votes = over(ft.reduce.sign_vote, 9).finished(torch.zeros(40), weighted(x))
    same_bits("honest signs", votes.grads, honest.mean(0).sign())


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan"), float("inf"), True, None, "0.5", torch.tensor(0.5)])
def test_tau_is_a_number_from_0_to_1(tau):
    with pytest.raises(ft.ArgumentError, match=r"and_mask\(tau\) needs a number in \[0, 1\], got"):
        ft.reduce.and_mask(tau)


@pytest.mark.parametrize("reducer", [ft.reduce.and_mask(0.3), ft.reduce.sign_vote], ids=repr)
def test_it_is_lawful_and_can_be_traced(reducer):
    check_reducer(reducer)
    batch = weighted(PARITY)

    def finished(x, weight):
        return over(reducer, 2).finished(torch.zeros(3), {"x": x, "weight": weight}).grads

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    graph = make_fx(finished)(fake.from_tensor(batch["x"]), fake.from_tensor(batch["weight"]))
    same_bits("traced", graph(-batch["x"], batch["weight"]), finished(-batch["x"], batch["weight"]))


def test_names_say_what_runs():
    assert repr(ft.reduce.and_mask(0.5)) == "reduce.and_mask(0.5)"
    assert repr(ft.reduce.and_mask(1)) == "reduce.and_mask(1)"
    facts = ft.explain(over(ft.reduce.and_mask(0.5), 4, "auto")).facts
    assert "the reducer has to see the parts" in facts["plan"]
