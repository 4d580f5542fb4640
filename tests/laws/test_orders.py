"""Law 5, of orders: every shuffle is a bijection, however long, and mixes; none is ever stored."""

import gc
import math
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laid import Laid, numbers, order_of

import functrain as ft
from functrain.data.laws import check_prefetch, check_source
from functrain.data.permutation import inverse, permuted

seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 2**40)
stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=6).filter(
    lambda listed: sum(length for length, _ in listed)
)


def covers(order, length):
    return len(order) == length and np.array_equal(np.bincount(order, minlength=length), np.ones(length, int))


# --- bijections ---------------------------------------------------------------------------------------------------


def test_a_shuffle_is_a_bijection_for_every_length_to_5000():
    for length in range(1, 5001):
        assert covers(permuted(np.arange(length), length, seed=length % 11 - 5, epoch=length % 7), length), length


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 255, 256, 257, 258, 1000, 4095, 4096, 4097, 4999, 5000])
def test_of_every_seed_and_epoch_too(length):
    for seed in range(-20, 20):
        assert covers(permuted(np.arange(length), length, seed, epoch=abs(seed) % 3), length), seed


def test_a_chunk_aware_shuffle_is_a_bijection_for_every_length_to_300_and_others_to_5000():
    for length in [*range(1, 301), *range(301, 5001, 97)]:
        source = Laid((length, 1 + length % 97)).shuffle(length, within=8 * (1 + length % 501))
        assert covers(order_of(source, length % 5), length), length


@given(stretches, st.integers(1, 5000), seeds, epochs)
def test_a_chunk_aware_shuffle_is_a_bijection_of_any_stretches(stretches, within, seed, epoch):
    source = Laid(*stretches).shuffle(seed, within=within)
    assert covers(order_of(source, epoch), len(source))


@given(st.integers(2, 10**12), seeds, epochs, st.data())
def test_drawn_positions_of_vast_shuffles_go_to_places_of_their_own_and_back(length, seed, epoch, data):
    places = np.unique(np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=200))))
    index = permuted(places, length, seed, epoch)
    assert index.min() >= 0
    assert index.max() < length
    assert len(np.unique(index)) == len(places)
    assert np.array_equal(inverse(index, length, seed, epoch), places)


@given(st.integers(2, 3000), seeds, st.one_of(st.none(), epochs))
def test_the_inverse_undoes_a_shuffle_everywhere(length, seed, epoch):
    order = permuted(np.arange(length), length, seed, epoch)
    assert np.array_equal(order[inverse(np.arange(length), length, seed, epoch)], np.arange(length))


@given(st.integers(1, 10**12), st.integers(1, 10**7), st.integers(1, 2**40), seeds, st.data())
def test_drawn_positions_of_vast_chunk_aware_shuffles_go_to_places_of_their_own(length, step, within, seed, data):
    source = Laid((length, step)).shuffle(seed, within=within)
    places = np.unique(np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=100))))
    index = source.take(places, 3).numpy()
    assert index.min() >= 0
    assert index.max() < length
    assert len(np.unique(index)) == len(places)
    assert index.tolist() == [int(source.get(int(place), 3)) for place in places]


@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers(10**9).shuffle(0),
        lambda: numbers(10**12).shuffle(0),
        lambda: Laid((10**12, 1000)).shuffle(0, within="256 MiB"),
        lambda: Laid(*[(10**9 + k, 1000) for k in range(50)]).shuffle(0, within="256 MiB"),
        lambda: numbers(10**12).split(0.8, seed=0)[0].shuffle(1).shard(3, 8),
        lambda: ft.mix([numbers(10**12), numbers(10**9).shuffle(2)], seed=0),
    ],
    ids=["billion", "trillion", "chunks", "files", "split", "mix"],
)
def test_a_vast_order_takes_no_memory(make):
    """Blocks of 65,536 positions are remembered, half a MiB each; an order of 10⁹ stored would be 8 GB."""
    tracemalloc.start()
    try:
        source = make()
        for place in (0, len(source) // 3, len(source) - 1):
            assert 0 <= int(source(place)) < 10**12
        batch = source.batch(128)(10**6).numpy()
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()
    assert len(set(batch.tolist())) == 128


# --- mixing -------------------------------------------------------------------------------------------------------

MIXED = {
    "full": lambda length, seed: numbers(length).shuffle(seed),
    "in blocks": lambda length, seed: Laid((length, 4)).shuffle(seed, within=8 * 8),
    "in one block": lambda length, seed: Laid((length, 4)).shuffle(seed, within=8 * length),
}


def too_far(counts, expected, freedom):
    """Whether chi-square lies more than five standard deviations off; seeds are fixed, so this never flakes."""
    return ((counts - expected) ** 2 / expected).sum() > freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vary", ["seed", "epoch"])
@pytest.mark.parametrize("kind", MIXED)
def test_every_position_sees_every_element_equally_often(kind, vary):
    length, draws = 20, 400
    counts = np.zeros((length, length))
    fixed = MIXED[kind](length, 5)
    for n in range(draws):
        order = order_of(MIXED[kind](length, n)) if vary == "seed" else order_of(fixed, n)
        counts[np.arange(length), order] += 1
    assert not too_far(counts, draws / length, (length - 1) ** 2)


@pytest.mark.parametrize("kind", MIXED)
def test_orders_of_other_seeds_and_epochs_have_nothing_to_do_with_each_other(kind):
    length = 20_000
    source, other = MIXED[kind](length, 0), MIXED[kind](length, 1)
    orders = [*(order_of(source, n) for n in range(3)), *(order_of(other, n) for n in range(2)), np.arange(length)]
    for n, one in enumerate(orders):
        for two in orders[:n]:
            # Elements of a block stand together in an epoch: only as many are independent as there are blocks.
            assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(length / 8)
            assert (one == two).sum() < 12


def test_differences_of_neighbours_are_those_of_chance():
    """Of two different elements of n at random, the difference d has probability 2 (n − d) / (n (n − 1))."""
    length, bins = 30_000, 30
    differences = np.abs(np.diff(order_of(numbers(length).shuffle(4))))
    counts, edges = np.histogram(differences, bins, (0.5, length + 0.5))
    below = np.floor(edges)
    up_to = (2 * length * below - below * (below + 1)) / (length * (length - 1))
    up_to[-1] = 1.0
    assert not too_far(counts, np.diff(up_to) * (length - 1), bins - 1)


def simulated(source, run_of, epochs):
    """How often neighbours come from one run."""
    return np.mean([np.mean(np.diff(run_of[order_of(source, epoch)]) == 0) for epoch in range(epochs)])


@pytest.mark.parametrize(
    ("layout", "within", "tolerance"),
    [
        ([(2000, 20)], 8 * 100, 0.002),
        ([(2000, 20)], 8 * 20, 0.002),
        ([(2000, 20)], 8 * 1000, 0.002),
        ([(2000, 20)], 8 * 10**6, 0.002),
        ([(2003, 50)], 8 * 150, 0.004),
        ([(1000, 10), (1000, 40)], 8 * 160, 0.01),
        ([(170, 17)] * 12, 8 * 100, 0.003),
        ([(500, 500), (40, 1)], 8 * 500, 0.01),
    ],
)
def test_quality_is_what_simulation_finds(layout, within, tolerance):
    base = Laid(*layout)
    source = base.shuffle(1, within=within)
    p_blocks = simulated(source, base.run_of(), 150)
    p_full = simulated(base.shuffle(1), base.run_of(), 150)
    assert source.quality == pytest.approx(1 - (p_blocks - p_full), abs=tolerance)


def test_quality_ends_at_that_of_a_full_shuffle():
    base = Laid((1000, 10))
    qualities = [base.shuffle(0, within=8 * 10 * held).quality for held in (1, 2, 4, 16, 100)]
    assert qualities == sorted(qualities)
    assert qualities[0] == pytest.approx(1 / 10, abs=0.01)
    assert qualities[-1] == base.shuffle(0).quality == 1.0


def test_an_order_that_nobody_holds_lets_go_of_its_source_at_once():
    gc.disable()
    try:
        for name, make in FORGOTTEN.items():
            base = Laid((24, 4))
            source = make(base)
            source.get(0, 0)
            gone = weakref.ref(base)
            del source, base
            assert gone() is None, name
    finally:
        gc.enable()


FORGOTTEN = {
    "full": lambda s: s.shuffle(1),
    "chunk-aware": lambda s: s.shuffle(1, within=64).batch(2).part(0, 2),
    "weighted": lambda s: s.weighted([1] * 24, 0),
    "mixed": lambda s: ft.mix([s, s], seed=0).batch(3),
    "balanced": lambda s: s.balanced([0, 1] * 12),
    "poisson": lambda s: s.poisson(0.2, seed=0),
    "groups": lambda s: s.split(0.5, groups=[0, 1] * 12)[0],
}


# --- as sources ---------------------------------------------------------------------------------------------------

MAKES = {
    "chunk-aware": lambda: Laid((23, 4)).shuffle(1, within=64),
    "chunk-aware, uneven": lambda: Laid((7, 3), (0, 2), (9, 5), (5, 9)).shuffle(1, within=80),
    "chunk-aware twice": lambda: Laid((23, 4)).shuffle(1, within=64).shuffle(2, within=64),
    "chunk-aware batches": lambda: Laid((23, 4)).shuffle(1, within=64).batch(5),
    "weighted": lambda: numbers(23).weighted(torch.arange(23), 3),
    "weighted, long": lambda: numbers(5).weighted([0, 1, 0, 2, 3], 3, length=40).batch(7),
    "weighted and shuffled": lambda: numbers(23).weighted(np.arange(23), 3).shuffle(1).shard(1, 2),
    "mixed": lambda: ft.mix([numbers(9), numbers(14).shuffle(1)], seed=2),
    "mixed by weights": lambda: ft.mix({"a": numbers(9), "b": numbers(4).repeat()}, {"a": 0.3, "b": 0.7}, seed=2, length=17),
    "mixed without end": lambda: ft.mix([numbers(9).shuffle(0).repeat(), numbers(4)], [1, 2], seed=2),
    "mixed batches": lambda: ft.mix([numbers(9).shuffle(0).batch(3), numbers(12).batch(3)], seed=2).shuffle(1),
    "mixed in batches": lambda: ft.mix([numbers(9).shuffle(0), numbers(40)], seed=2).batch(4).repeat(3),
    "mixes mixed": lambda: ft.mix([ft.mix([numbers(9), numbers(3)]), numbers(20).weighted([1] * 20, 0)], seed=2),
    "mixed, deferred": lambda: ft.mix([numbers(9).batch(3).deferred(), numbers(12).batch(4).deferred()]),
    "part of batches": lambda: numbers(23).shuffle(1).batch(5).part(1, 3),
    "part of whole batches": lambda: numbers(23).shuffle(1).batch(5, drop_last=True).part(4, 5),
    "part of batches, deferred": lambda: numbers(23).shuffle(1).batch(5).deferred().part(0, 3),
    "part of batches without end": lambda: numbers(23).shuffle(1).repeat().batch(5).part(1, 3).map(lambda x: x + 1),
    "groups": lambda: numbers(23).split(0.5, groups=[n // 3 for n in range(23)], seed=1)[0],
    "groups, chunk-aware": lambda: Laid((23, 4)).split(0.5, groups=[n // 6 for n in range(23)])[1].shuffle(0, within=64),
}


@pytest.mark.parametrize("name", MAKES)
def test_every_order_is_a_source(name):
    check_source(MAKES[name]())


@pytest.mark.parametrize("name", ["chunk-aware batches", "mixed in batches", "part of batches", "weighted, long"])
def test_every_order_can_be_prefetched(name):
    check_prefetch(MAKES[name](), depth=3)
