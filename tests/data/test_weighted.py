"""source.weighted: draws with replacement, each element as often as its weight says, and nothing but position decides."""

import concurrent.futures

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laid import numbers, order_of

import functrain as ft
from functrain.data.weighted import _table

WEIGHTS = [0, 1, 2, 0.5, 10, 0, 3.25, 1e-9, 1, 1]


def chi_square(counts, weights):
    """How many standard deviations chi-square lies off, over the weights that are expected ten times at least."""
    expected = np.asarray(weights) / np.sum(weights) * counts.sum()
    often = expected >= 10
    freedom = often.sum() - 1
    return (((counts - expected)[often] ** 2 / expected[often]).sum() - freedom) / np.sqrt(2 * freedom)


# --- probabilities ------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(0, 4)), min_size=1, max_size=60).filter(any))
def test_the_table_holds_the_weights(weights):
    """What a column keeps, and what it passes on, adds up to every element's share."""
    shares = np.array(weights, float) * len(weights) / np.sum(weights)
    kept, alias = _table(shares)
    assert ((kept >= 0) & (kept <= 1)).all()
    given_to = kept.copy()
    np.add.at(given_to, alias, 1 - kept)
    np.testing.assert_allclose(given_to, shares, rtol=1e-9, atol=1e-9)
    assert (given_to[shares == 0] == 0).all()


@pytest.mark.parametrize("seed", [0, 1, -(2**70)])
@pytest.mark.parametrize("weights", [WEIGHTS, [1] * 7, range(1, 200), [1, 10**3], [0, 2, 1]], ids=len)
def test_elements_come_as_often_as_their_weights_say(weights, seed):
    drawn = order_of(numbers(len(weights)).weighted(weights, seed, length=40_000))
    counts = np.bincount(drawn, minlength=len(weights))
    assert (counts[np.asarray(weights) == 0] == 0).all()
    assert chi_square(counts, weights) < 5


def test_at_one_position_elements_come_as_often_over_epochs_and_seeds():
    source = numbers(10).weighted(WEIGHTS, 0)
    for drawn in (
        [int(source.get(3, epoch)) for epoch in range(400)],
        [int(numbers(10).weighted(WEIGHTS, seed)(3)) for seed in range(400)],
    ):
        assert chi_square(np.bincount(drawn, minlength=10), WEIGHTS) < 5


def test_the_only_element_of_a_weight_is_always_drawn():
    assert order_of(numbers(3).weighted([0, 0, 1e-9], 0)).tolist() == [2, 2, 2]


def test_draws_do_not_depend_on_those_before():
    """Chi-square over pairs of neighbours, and over pairs of epochs and of seeds."""
    weights = np.array([1, 2, 3, 4])
    draw = lambda seed, epoch: order_of(numbers(4).weighted(weights, seed, length=20_000), epoch)  # noqa: E731
    one = draw(0, 0)
    for first, second in [(one[:-1], one[1:]), (one, draw(0, 1)), (one, draw(1, 0))]:
        counts = np.bincount(4 * first + second, minlength=16)
        assert chi_square(counts, np.outer(weights, weights).reshape(-1)) < 5


@given(st.integers(), st.integers(0, 2**40), st.integers(1, 2**50))
def test_a_draw_is_that_of_its_seed_epoch_and_position_alone(seed, epoch, start):
    source = numbers(len(WEIGHTS)).weighted(WEIGHTS, seed, length=2**51)
    again = numbers(len(WEIGHTS)).weighted(torch.tensor(WEIGHTS, dtype=torch.float64), seed, length=2**51)
    places = np.arange(start, start + 20)
    drawn = source.take(places, epoch)
    assert torch.equal(drawn, again.take(places, epoch))
    assert drawn.tolist() == [int(source.get(int(place), epoch)) for place in places]
    assert torch.equal(drawn.flip(0), source.take(places[::-1].copy(), epoch))


def test_the_order_is_the_one_it_always_was():
    """A run is resumed by its position alone: the draws of a seed must not change between versions."""
    source = numbers(10).weighted(WEIGHTS, 5)
    assert order_of(source).tolist() == [1, 4, 4, 4, 4, 4, 1, 2, 4, 2]
    assert order_of(source, 3).tolist() == [4, 4, 4, 4, 4, 4, 2, 6, 1, 6]


def test_threads_see_one_order():
    source = numbers(10).weighted(WEIGHTS, 5, length=200).batch(10)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: source.get(n % 20, n % 7).tolist(), range(100)))
    assert found == [source.get(n % 20, n % 7).tolist() for n in range(100)]


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        [1, 0, 2],
        (1.0, 0.0, 2.0),
        np.array([1, 0, 2], np.uint8),
        torch.tensor([1, 0, 2]),
        torch.tensor([0.5, 0, 1], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_weights_are_numbers_in_any_array_and_unit(weights):
    expected = order_of(numbers(3).weighted([1, 0, 2], 4, length=50))
    assert np.array_equal(order_of(numbers(3).weighted(weights, 4, length=50)), expected)


def test_weights_may_be_as_large_and_as_small_as_floats_are():
    assert set(order_of(numbers(3).weighted([1.7e308, 0, 1.7e308], 4, length=50)).tolist()) == {0, 2}
    assert set(order_of(numbers(3).weighted([5e-324, 0, 5e-324], 4, length=50)).tolist()) == {0, 2}
    assert set(order_of(numbers(3).weighted([1e-300, 0, 1e300], 4, length=50)).tolist()) == {2}
    assert set(order_of(numbers(3).weighted([True, False, True], 4, length=50)).tolist()) == {0, 2}


def test_weights_are_copied_into_the_order():
    weights = np.array([0.0, 1, 1, 1])
    source = numbers(4).weighted(weights, 0)
    before = order_of(source).tolist()
    weights[:] = 0
    assert order_of(source).tolist() == before


TEN = numbers(10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TEN.weighted([1] * 9, 0), r"the source has 10, got weights of shape \(9,\)"),
        (lambda: TEN.weighted(np.ones((10, 1)), 0), r"got weights of shape \(10, 1\)"),
        (lambda: TEN.weighted(3, 0), r"got weights of shape \(\)"),
        (lambda: TEN.weighted([[1], [1, 2]] * 5, 0), r"weights are numbers \(n,\)"),
        (lambda: TEN.weighted(["a"] * 10, 0), r"weights are numbers \(n,\).*list of <U1"),
        (lambda: TEN.weighted([None] * 10, 0), r"weights are numbers \(n,\).*list of object"),
        (lambda: TEN.weighted([1] * 9 + [-1], 0), "finite and at least 0: 1 are not, weight 9 is -1"),
        (lambda: TEN.weighted([float("nan")] * 10, 0), "finite and at least 0: 10 are not, weight 0 is nan"),
        (lambda: TEN.weighted([float("inf")] * 10, 0), "finite and at least 0: 10 are not, weight 0 is inf"),
        (lambda: TEN.weighted([0] * 10, 0), "all weights are 0"),
        (lambda: TEN.weighted([1] * 10, 0, length=0), "length must be at least 1, got 0"),
        (lambda: TEN.weighted([1] * 10, 0.5), "seed must be an int"),
        (lambda: TEN.repeat().weighted([1] * 10, 0), "weighted needs a source with an end"),
        (lambda: TEN.shuffle(0).weighted([1] * 10, 0), "order of this source changes with the epoch.*leave .shuffle out"),
        (lambda: TEN.shard(10, 11).weighted([], 0), "without elements has none to draw"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_explain_tells_how_uneven_the_weights_are():
    text = str(ft.explain(numbers(4).weighted([1, 1, 0, 0], 8)))
    assert "seed 8" in text
    assert "as if 2.0 of 4 elements had all" in text
    assert "2 have weight 0" in text
    assert "16 B for each of 4 elements" in text


def test_a_rare_class_can_be_seen_half_of_the_time():
    """A story: one in fifty is positive; weights that undo that let the mean of the labels be a half."""
    labels = (torch.arange(1000) % 50 == 0).long()
    weights = 1 / torch.bincount(labels)[labels]
    seen = torch.cat(list(ft.arrays(labels).weighted(weights, seed=0, length=4000).batch(100)))
    assert float(seen.float().mean()) == pytest.approx(0.5, abs=0.03)
