"""How well the shuffle shuffles: every position sees every element, and orders have nothing to do with each other."""

import concurrent.futures
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from functrain.data import permutation
from functrain.data.permutation import permuted


def order(length, seed, epoch=0):
    return permuted(np.arange(length), length, seed, epoch)


def too_far(counts, expected, freedom):
    """Whether chi-square lies more than five standard deviations off; seeds are fixed, so this never flakes."""
    return ((counts - expected) ** 2 / expected).sum() > freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vary", ["seed", "epoch"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 17, 33, 64])
def test_every_position_sees_every_element_equally_often(length, vary):
    draws = 1200
    counts = np.zeros((length, length))
    for n in range(draws):
        counts[np.arange(length), order(length, *((n, 0) if vary == "seed" else (0, n)))] += 1
    assert not too_far(counts, draws / length, (length - 1) ** 2)


@pytest.mark.parametrize("length", [3, 4, 5])
def test_every_order_of_a_few_elements_is_equally_likely(length):
    draws = 4000
    seen = Counter(tuple(order(length, seed).tolist()) for seed in range(draws))
    counts = np.array([seen[each] for each in itertools.permutations(range(length))])
    assert not too_far(counts, draws / len(counts), len(counts) - 1)


@pytest.mark.parametrize("length", [1000, 65537, 100_003])
def test_neighbours_do_not_stay_neighbours(length):
    index = order(length, 0)
    stayed = np.abs(np.diff(index)) == 1
    assert stayed.mean() < 10 / length + 0.002
    assert abs(np.corrcoef(np.arange(length), index)[0, 1]) < 5 / math.sqrt(length)


def test_seeds_epochs_and_no_epoch_give_orders_of_their_own():
    orders = [order(50, seed, epoch).tolist() for seed in range(20) for epoch in (None, *range(20))]
    assert len({tuple(each) for each in orders}) == len(orders)
    fixed = np.mean([np.mean(np.array(a) == np.array(b)) for a, b in itertools.pairwise(orders)])
    assert fixed == pytest.approx(1 / 50, abs=0.01)


def test_seeds_may_be_any_integer():
    orders = [tuple(order(40, seed).tolist()) for seed in (0, 1, -1, 2**63, 2**64 - 2, -(2**63) + 1)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("length", [5, 65536, 65537, 200_000, 10**12])
def test_blocks_and_scattered_positions_agree(length):
    generator = np.random.default_rng(0)
    last = min(length, 200_000)
    expected = np.concatenate([permuted(np.array([p]), length, 1, 2) for p in range(0, last, max(1, last // 40))])
    places = np.arange(0, last, max(1, last // 40))
    mixed = generator.permutation(len(places))
    assert np.array_equal(permuted(places[mixed], length, 1, 2), expected[mixed])
    if last > 65536:
        border = np.arange(65536 - 3, min(65536 + 3, length))
        assert np.array_equal(permuted(border, length, 1, 2), [permuted(np.array([p]), length, 1, 2)[0] for p in border])


def test_the_order_is_the_one_it_always_was():
    """A run is resumed by its position alone: the order of a seed must not change between versions."""
    assert order(10, 0).tolist() == [9, 0, 8, 4, 3, 1, 6, 2, 7, 5]
    assert permuted(np.array([0, 10**11, 10**12 - 1]), 10**12, 123, 4).tolist() == [
        100385236820,
        743043529986,
        253369195109,
    ]


def test_many_threads_see_one_order():
    permutation._block.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        orders = list(pool.map(lambda n: order(5000, n % 4).tobytes(), range(64)))
    assert orders == [order(5000, n % 4).tobytes() for n in range(64)]
