"""ft.mix: shares that are exact, sources that lose and repeat nothing, and nothing but arithmetic on positions."""

import concurrent.futures
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laid import numbers

import functrain as ft
from functrain.data import Source
from functrain.data.laws import same

BLOCK = 1024
lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=6)
weights = st.one_of(st.integers(0, 5), st.floats(0, 1), st.floats(1e-9, 1e-3))


class Named(Source):
    """Elements (which source, which element, which epoch); another order each epoch, so that a turn is told from others."""

    steady = False

    def __init__(self, number, length):
        self.number, self.length = number, length

    def get(self, i, epoch):
        return torch.tensor([self.number, i, epoch])

    def take(self, indices, epoch):
        return torch.stack([torch.tensor([self.number, i, epoch]) for i in indices.tolist()])


def named(sizes):
    return [Named(number, size) for number, size in enumerate(sizes)]


def which(source, start, stop, epoch=0):
    """The source, and the turn of it, that each position takes."""
    return source.found(np.arange(start, stop), epoch)


# --- shares -------------------------------------------------------------------------------------------------------


@given(lengths, st.integers(), st.integers(0, 10**6))
def test_by_default_an_epoch_holds_every_element_of_every_source_once(sizes, seed, epoch):
    source = ft.mix(named(sizes), seed=seed)
    assert len(source) == sum(sizes)
    numbers_of, turns = which(source, 0, len(source), epoch)
    for number, size in enumerate(sizes):
        # One whole epoch of the source, in its own order.
        assert turns[numbers_of == number].tolist() == list(range(epoch * size, (epoch + 1) * size))


@given(st.lists(weights, min_size=1, max_size=7).filter(any), st.integers(1, 5000), st.integers(), st.integers(0, 3))
def test_each_source_is_read_in_order_from_epoch_to_epoch(shares, length, seed, epoch):
    source = ft.mix([numbers(7 + k) for k in range(len(shares))], shares, seed=seed, length=length)
    before = [which(source, 0, length, e) for e in range(epoch + 1)]
    for number in range(len(shares)):
        turns = np.concatenate([turn[of == number] for of, turn in before])
        assert np.array_equal(turns, np.arange(len(turns)))
        # What a position takes is that turn of the source's own epochs.
        place = np.flatnonzero(before[-1][0] == number)[:1]
        for at in place.tolist():
            assert int(source.get(at, epoch)) == before[-1][1][at] % (7 + number)


@given(st.lists(weights, min_size=1, max_size=7).filter(any), st.integers(), st.integers(0, 10**9))
def test_shares_are_exact_after_any_number_of_blocks(shares, seed, start):
    source = ft.mix([numbers(1).repeat() for _ in shares], shares, seed=seed)
    turns = source.turns(start * BLOCK)
    assert sum(turns) == start * BLOCK
    bound = 1 + math.log(len(shares)) / 2
    # In fractions: a float has lost what is to be seen here.
    exact = [Fraction(share) for share in shares]
    for had, share in zip(turns, exact):
        assert abs(had - start * BLOCK * share / sum(exact)) <= bound


@pytest.mark.parametrize("shares", [[0.7, 0.2, 0.1], [1, 1, 1], [1000, 1, 1], [math.pi, math.e, 0.0], [1] * 40])
def test_shares_hold_at_every_prefix_up_to_a_block(shares):
    source = ft.mix([numbers(50) for _ in shares], shares, seed=3, length=10_000)
    numbers_of, _ = which(source, 0, 10_000)
    counts = np.cumsum(numbers_of[:, None] == np.arange(len(shares)), axis=0)
    expected = np.arange(1, 10_001)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(counts - expected).max() < BLOCK / 4 + 2
    # Within a block it is a draw without replacement: five standard deviations.
    share = np.array(shares) / sum(shares)
    assert (np.abs(counts - expected).max(0) <= 5 * np.sqrt(BLOCK * share * (1 - share)) / 2 + 3).all()


def test_whose_turn_it_is_has_no_pattern():
    """Chi-square over pairs of neighbours, over place in the block, and over two epochs; five standard deviations."""
    source = ft.mix([numbers(10), numbers(10)], seed=1, length=64 * BLOCK)
    one, two = which(source, 0, 64 * BLOCK)[0], which(source, 0, 64 * BLOCK, 1)[0]
    for first, second in [(one[:-1], one[1:]), (one, two), (one[:-BLOCK], one[BLOCK:])]:
        counts = np.bincount(2 * first + second, minlength=4)
        expected = len(first) / 4
        assert ((counts - expected) ** 2 / expected).sum() < 3 + 5 * math.sqrt(6)
    by_place = one.reshape(64, BLOCK).sum(0)
    assert ((by_place - 32) ** 2 / 16).sum() < BLOCK + 5 * math.sqrt(2 * BLOCK)


# --- elements -----------------------------------------------------------------------------------------------------


def test_positions_one_by_one_many_at_once_and_in_any_order_agree():
    source = ft.mix([Named(0, 300), Named(1, 41), Named(2, 7).repeat()], [5, 3, 1], seed=4, length=2500)
    places = np.random.default_rng(0).permutation(2500)[:200]
    expected = torch.stack([source.get(int(place), 2) for place in places])
    assert torch.equal(source.take(places, 2), expected)
    assert all(map(torch.equal, source.elements(places, 2), expected))
    neighbours = np.arange(1000, 1100)
    assert torch.equal(source.take(neighbours, 2), torch.stack([source.get(int(place), 2) for place in neighbours]))


@given(lengths, st.integers(), st.integers(1, 60))
def test_batches_over_epochs_hold_every_element_once_an_epoch(sizes, seed, size):
    sizes = [min(length, 40) for length in sizes]
    source = ft.mix([numbers(length).shuffle(number) for number, length in enumerate(sizes)], seed=seed)
    for epoch in (0, 3):
        seen = Counter(int(n) for batch in source.batch(size).epoch(epoch) for n in batch)
        assert seen == Counter(n for length in sizes for n in range(length))


def test_sources_without_end_are_read_on_and_a_mix_of_them_has_none():
    mixed = ft.mix([Named(0, None), Named(1, 3)], [2, 1], seed=0)
    assert mixed.length is None
    got = torch.stack([mixed(i) for i in range(300)])
    assert got[got[:, 0] == 0][:, 1].tolist() == list(range(int((got[:, 0] == 0).sum())))
    small = got[got[:, 0] == 1]
    assert (3 * small[:, 2] + small[:, 1]).tolist() == list(range(len(small)))
    assert mixed.steady
    cut = ft.mix([Named(0, None), Named(1, 3)], [2, 1], seed=0, length=100)
    # An epoch of the mix that ends does not send a source without end back to its beginning.
    assert sorted(int(cut.get(i, e)[1]) for e in (0, 1) for i in range(100) if int(cut.get(i, e)[0]) == 0) == list(range(133))


def test_elements_of_other_structures_are_given_one_by_one_and_made_alike_by_map():
    images = ft.arrays({"x": torch.zeros(20, 3), "y": torch.zeros(20)})
    texts = ft.arrays({"x": torch.ones(20, 3)})
    mixed = ft.mix({"images": images, "texts": texts}, seed=0)
    assert {tuple(sorted(mixed(i))) for i in range(40)} == {("x",), ("x", "y")}
    with pytest.raises(ft.TreeError, match=r"the elements of (images and texts|texts and images) disagree"):
        mixed.batch(20)(0)
    assert mixed.map(lambda element: element["x"]).batch(40)(0).sum() == 60


@pytest.mark.parametrize("other", [torch.ones(20, 3, dtype=torch.float64), torch.ones(20, 4), torch.ones(20, 3, 1)])
def test_a_batch_never_changes_what_its_elements_are(other):
    mixed = ft.mix([ft.arrays(torch.zeros(20, 3)), ft.arrays(other)])
    with pytest.raises(ft.TreeError, match=r"disagree .*float32.*\.map\(fn\)"):
        mixed.batch(20)(0)


def test_a_weight_of_zero_leaves_a_source_out():
    mixed = ft.mix({"a": numbers(5), "b": Named(1, 5)}, {"a": 1, "b": 0}, length=3000)
    assert set(which(mixed, 0, 3000)[0].tolist()) == {0}


def test_the_order_is_the_one_it_always_was():
    """A run is resumed by its position alone: the mix of a seed must not change between versions."""
    source = ft.mix([numbers(5), numbers(9)], seed=5)
    assert "".join(map(str, which(source, 0, 14)[0])) == "00101111001111"
    assert "".join(map(str, which(source, 0, 14, 2)[0])) == "11100111011001"


def test_threads_see_one_order():
    source = ft.mix([Named(0, 3000), Named(1, 500)], seed=5).batch(50)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: source.get(n % 70, n % 5), range(140)))
    assert all(same(batch, source.get(n % 70, n % 5)) for n, batch in enumerate(found))


# --- what it takes ------------------------------------------------------------------------------------------------

TEN = numbers(10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ft.mix([]), "at least one source"),
        (lambda: ft.mix({}), "at least one source"),
        (lambda: ft.mix(TEN), "a list or a dict of sources, got Laid"),
        (lambda: ft.mix("ab"), "a list or a dict of sources, got str"),
        (lambda: ft.mix([TEN, [1]]), "mix takes sources, got list as 'source 1'"),
        (lambda: ft.mix([TEN, TEN.shard(10, 11)]), "'source 1' has no elements"),
        (lambda: ft.mix([TEN, TEN.batch(2).deferred()]), r"deferred\(\) all of them, or none"),
        (lambda: ft.mix({"a": TEN, "b": TEN.repeat()}), "'b' has no end.*give weights"),
        (lambda: ft.mix([TEN, TEN], [1]), "one for each of 2 sources"),
        (lambda: ft.mix([TEN, TEN], 0.5), "one for each of 2 sources, got 0.5"),
        (lambda: ft.mix({"a": TEN}, {"b": 1}), r"sources \['a'\], got weights \['b'\]"),
        (lambda: ft.mix([TEN], {"a": 1}), r"sources \['source 0'\], got weights \['a'\]"),
        (lambda: ft.mix([TEN, TEN], [1, -1]), "at least 0, got -1 for 'source 1'"),
        (lambda: ft.mix([TEN, TEN], [1, math.nan]), "finite numbers of at least 0, got nan"),
        (lambda: ft.mix([TEN, TEN], [True, 1]), "finite numbers of at least 0, got True"),
        (lambda: ft.mix([TEN, TEN], ["1", 1]), "finite numbers of at least 0, got '1'"),
        (lambda: ft.mix([TEN, TEN], [0, 0.0]), "all weights are 0"),
        (lambda: ft.mix([TEN, TEN], length=0), "length must be at least 1, got 0"),
        (lambda: ft.mix([TEN, TEN], seed=None), "seed must be an int"),
        (lambda: ft.mix([TEN, TEN.repeat()], [1, 1]).shuffle(0), "shuffle needs a source with an end"),
        (lambda: ft.mix([TEN, TEN]).split(0.5), "split first, then shuffle"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


@pytest.mark.parametrize("given_as", [[3, 1], (3.0, 1.0), np.array([3, 1]), torch.tensor([0.75, 0.25]), {"a": 6, "b": 2}])
def test_weights_are_in_any_unit(given_as):
    sources = {"a": numbers(30), "b": numbers(10)}
    assert np.array_equal(which(ft.mix(sources, given_as), 0, 40)[0], which(ft.mix(sources), 0, 40)[0])


def test_explain_tells_shares_and_epochs():
    sources = {"web": numbers(1000), "code": numbers(50).shuffle(3)}
    text = str(ft.explain(ft.mix(sources, {"web": 3, "code": 1}, seed=8, length=400)))
    assert "web: 75.00%, 0.3 of its epochs in one" in text
    assert "code: 25.00%, 2 of its epochs in one" in text
    assert "seed 8" in text
    assert "keyed by seed 3" in text
    assert "length: 400" in text
