"""Poisson-subsampled batches: each element by a chance of its own, the same for ever, padded with rows that count nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.data.poisson import Poisson


def numbers(length):
    return ft.arrays(torch.arange(length))


def members(batch):
    rows, drawn = batch
    assert set(drawn.tolist()) <= {0.0, 1.0}
    return rows[drawn == 1].tolist()


@given(
    length=st.integers(1, 150),
    rate=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(),
    pad=st.integers(1, 20),
    epoch=st.integers(0, 2**40),
)
def test_batches_hold_distinct_elements_in_few_shapes(length, rate, seed, pad, epoch):
    source = numbers(length).poisson(rate, seed, pad).epoch(epoch)
    assert len(source) == max(1, round(1 / rate))
    for rows, drawn in itertools.islice(source, 3):
        assert rows.shape == drawn.shape
        assert drawn.dtype == torch.float32
        held = members((rows, drawn))
        assert held == sorted(set(held))
        assert set(rows.tolist()) <= set(range(length))
        # Padded to the next multiple, and an empty batch to one block.
        assert len(rows) == max(1, math.ceil(len(held) / pad)) * pad
        # What fills up is a row that is in the batch anyhow.
        assert set(rows.tolist()) == set(held or [0])


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.7])
def test_each_element_comes_with_its_chance_independent_of_others_and_other_batches(rate):
    length, batches = 400, 600
    source = Poisson(numbers(length), rate, 5, 1)
    inside = np.zeros((batches, length))
    for b in range(batches):
        # Over several epochs: their numbers follow each other without a seam.
        inside[b, source.members(b % len(source), b // len(source))] = 1
    count, variance = inside.size, rate * (1 - rate)
    assert abs(inside.mean() - rate) < 5 * math.sqrt(variance / count)
    # Means by element, and by batch, scatter as those of independent draws: chi-square with as many degrees of freedom.
    for axis, size in ((0, batches), (1, length)):
        means = inside.mean(axis)
        chi = ((means - rate) ** 2).sum() / (variance / size)
        kurtosis = (1 - 6 * variance) / variance / size
        assert abs(chi - len(means)) < 5 * math.sqrt((2 + kurtosis) * len(means)), axis
    centred = inside - rate
    for shift in ((0, 1), (1, 0), (1, 1)):
        shifted = np.roll(centred, shift, (0, 1))
        assert abs((centred * shifted).mean()) < 5 * variance / math.sqrt(count), shift


def test_another_seed_epoch_or_position_is_another_draw_and_a_longer_source_keeps_its_beginning():
    source = numbers(300).poisson(0.3, seed=1)
    draws = [members(source(0)), members(source(1)), members(source.epoch(1)(0)), members(numbers(300).poisson(0.3, seed=2)(0))]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    # Across blocks: an element's draw depends on its own number alone.
    longer = members(numbers(100_000).poisson(0.3, seed=1)(0))
    assert [n for n in longer if n < 300] == draws[0]
    assert abs(sum(n >= 1 << 15 for n in longer) / (100_000 - (1 << 15)) - 0.3) < 0.01


def test_it_does_not_share_draws_with_a_step_of_the_same_seed():
    seed, length = 3, 4000
    mine = torch.zeros(length)
    mine[members(numbers(length).poisson(0.5, seed)(0))] = 1
    step = ft.random.fold_in(ft.random.fold_in(ft.random.key(seed), 0), torch.arange(length)) < 0
    assert abs((mine == step).float().mean() - 0.5) < 0.05


SOURCES = {
    "arrays": lambda: ft.arrays({"x": torch.arange(46.0).reshape(23, 2), "y": np.arange(23)}),
    "shuffled": lambda: numbers(23).shuffle(1),
    "a shard": lambda: numbers(70).shard(1, 3),
    "one element": lambda: numbers(1),
}


@pytest.mark.parametrize("base", SOURCES)
@pytest.mark.parametrize("rate", [0.05, 0.4, 1.0])
def test_it_is_a_source(base, rate):
    source = SOURCES[base]().poisson(rate, seed=4, pad=3)
    ft.testing.check_source(source)
    ft.testing.check_prefetch(source, depth=2)


def test_an_epoch_of_a_run_goes_on_with_new_draws():
    source = numbers(40).poisson(0.25, seed=0, pad=4)
    assert len(source) == 4
    endless = source.repeat()
    assert [members(endless(8 + i)) for i in range(4)] == [members(batch) for batch in source.epoch(2)]
    # All of an epoch's batches together hold an element once on average.
    held = [n for epoch in range(200) for batch in source.epoch(epoch) for n in members(batch)]
    assert abs(len(held) / (200 * 40) - 1) < 5 * math.sqrt(0.75 / (200 * 40))


def test_it_says_what_it_draws():
    text = str(ft.explain(numbers(1000).poisson(0.1, seed=7)))
    assert "100 ± 9.5 of 1,000 elements, each with probability 0.1" in text
    assert "multiples of 64" in text


def test_refusals():
    source = numbers(10)
    for rate in (0, 0.0, -0.1, 1.5, float("nan"), True, "0.1", None):
        with pytest.raises(ft.ArgumentError, match=r"rate must be in \(0, 1\]"):
            source.poisson(rate, seed=0)
    with pytest.raises(ft.ArgumentError, match="pad must be at least 1, got 0"):
        source.poisson(0.1, seed=0, pad=0)
    with pytest.raises(ft.ArgumentError, match="seed must be an int, got None"):
        source.poisson(0.1, seed=None)
    with pytest.raises(ft.ArgumentError, match="needs a source with an end"):
        source.repeat().poisson(0.1, seed=0)
    with pytest.raises(ft.ArgumentError, match="without elements"):
        source.shard(10, 11).poisson(0.1, seed=0)
    with pytest.raises(ft.ArgumentError, match="deferred"):
        source.batch(2).deferred().poisson(0.1, seed=0)
