"""Keyed randomness: well mixed, and the same numbers however they are computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import PLANS
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.core import random
from functrain.testing import same_bits

COUNT = 200_000


def streams():
    """Numbers along a counter, along the keys of neighbouring seeds, of folds, of splits."""
    key = random.key(0)
    small = 1000
    seeds = torch.stack([random.key(seed) for seed in range(small)])
    return {
        "counter": random.uniform(key, (COUNT,)),
        "seeds": random.uniform(seeds, (COUNT // small,)),
        "first of seeds": random.uniform(seeds, (1,)),
        "positions": random.uniform(random.fold_in(key, torch.arange(COUNT))),
        "splits": random.uniform(random.split(key, COUNT)),
        "examples of steps": random.uniform(random.split(random.fold_in(key, torch.arange(500)), COUNT // 500)),
        "folded twice": random.uniform(random.fold_in(random.fold_in(key, torch.arange(COUNT)), 1)),
    }


@pytest.mark.parametrize("name", list(streams()))
def test_uniform_by_chi_square_and_moments(name):
    numbers = streams()[name].reshape(-1).double()
    count, bins = len(numbers), 100 if len(numbers) > 10_000 else 20
    expected = count / bins
    seen = torch.histc(numbers, bins, 0, 1)
    chi = ((seen - expected) ** 2 / expected).sum().item()
    # The normal approximation of chi-square with bins − 1 degrees of freedom; five standard deviations.
    assert abs(chi - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    assert abs(numbers.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(numbers.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)


@pytest.mark.parametrize("name", list(streams()))
def test_neighbours_are_independent(name):
    numbers = streams()[name]
    rows = numbers if numbers.ndim == 2 else numbers[None]
    for lag in (1, 2, 64):
        for axis in (0, 1):
            if rows.shape[axis] <= lag:
                continue
            a = rows.narrow(axis, 0, rows.shape[axis] - lag).reshape(-1)
            b = rows.narrow(axis, lag, rows.shape[axis] - lag).reshape(-1)
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
            assert abs(correlation) < 5 / math.sqrt(len(a)), (lag, axis)


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_each_bit_is_fair_and_flips_with_the_key(bit):
    here = (random.bits(random.key(1), (COUNT,)) >> bit) & 1
    there = (random.bits(random.key(2), (COUNT,)) >> bit) & 1
    bound = 5 * 0.5 / math.sqrt(COUNT)
    assert abs(here.double().mean() - 0.5) < bound
    assert abs((here ^ there).double().mean() - 0.5) < bound


def test_keys_do_not_meet():
    key = random.key(0)
    everything = [random.fold_in(key, torch.arange(COUNT)), random.bits(key, (COUNT,)), random.split(random.key(1), COUNT)]
    assert len(torch.cat(everything).unique()) == 3 * COUNT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_moments(dtype):
    numbers = random.normal(random.key(3), (COUNT,), dtype).double()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
        assert abs((numbers**power).mean() - moment) < 5 * spread / math.sqrt(COUNT), power
    assert numbers.isfinite().all()
    below = (numbers < 1).double().mean()
    assert abs(below - 0.841344746) < 5 * math.sqrt(0.134 / COUNT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_lies_in_its_half_open_interval(dtype):
    numbers = random.uniform(random.key(0), (COUNT,), dtype)
    assert numbers.dtype == dtype
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert random.uniform(random.key(0), (), dtype).shape == random.normal(random.key(0), (), dtype).shape == ()


@given(seed=st.integers(-(2**80), 2**80), shape=st.lists(st.integers(0, 4), max_size=3))
def test_the_same_bits_eager_vmapped_and_traced(seed, shape):
    keys = random.split(random.key(seed), 3)

    def draw(key):
        return random.uniform(key, shape), random.normal(key, shape), random.fold_in(key, 5)

    expected = draw(keys)
    assert expected[0].shape == (3, *shape)
    same_bits("vmap", torch.func.vmap(draw)(keys), expected)
    same_bits("alone", ft.tree.stack([draw(key) for key in keys]), expected)
    same_bits("traced", make_fx(draw)(random.split(random.key(0), 3))(keys), expected)


def test_seeds():
    assert random.key(2**64) == random.key(0)
    assert random.key(-1) == random.key(2**64 - 1)
    for seed in ("0", 0.0, True, None, torch.tensor(0)):
        with pytest.raises(ft.ArgumentError, match="a seed must be an int"):
            random.key(seed)
    keys = random.split(random.key(0), 3)
    assert random.example_keys(keys, 3) is keys
    with pytest.raises(ft.ArgumentError, match=r"keys have shape \(3,\), the batch has N = 4"):
        random.example_keys(keys, 4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_its_mean(p):
    x = torch.ones(1000, 200)
    for key in (random.key(0), random.split(random.key(0), 1000)):
        dropped = random.dropout(x, p, key)
        share = (dropped == 0).double().mean()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
        assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / (1 - p)))


@given(size=st.integers(1, 6), start=st.integers(0, 5), p=st.sampled_from([0.0, 0.3, 1.0]), channels=st.booleans())
def test_dropout_of_an_example_does_not_depend_on_its_mates(size, start, p, channels):
    keys, x = random.split(random.key(1), 6), torch.ones(6, 4, 3)
    part = slice(start, min(6, start + size))
    whole = random.dropout(x, p, keys, channels=channels)
    same_bits("part", random.dropout(x[part], p, keys[part], channels=channels), whole[part])
    vmapped = torch.func.vmap(lambda x, key: random.dropout(x[None], p, key[None], channels=channels)[0])(x, keys)
    same_bits("vmap", vmapped, whole)
    if channels:
        assert (whole == whole[:, :, :1]).all()
    folded = random.dropout(x.reshape(24, 3), p, keys) if not channels else whole.reshape(24, 3)
    same_bits("folded", folded.reshape(6, 4, 3), whole)


@pytest.mark.parametrize("how", PLANS)
def test_dropout_masks_are_the_same_in_every_plan(how):
    def loss(params, batch, *, key):
        return random.dropout(batch * params["w"], 0.5, key)

    params, batch, key = {"w": torch.ones(6)}, torch.eye(6) + 1, random.key(4)
    expected = ft.grad(loss)(params, batch, key=key)
    # Sums of small integers: the same mask gives the same bits in any order.
    same_bits(how, ft.parallel(ft.grad(loss), 3, how=how, workers=2)(params, batch, key=key), expected)
    other = ft.grad(loss)(params, batch, key=random.key(5))
    assert not torch.equal(expected.grads["w"], other.grads["w"])


def test_dropout_refuses_what_it_cannot_do():
    with pytest.raises(ft.ArgumentError, match=r"in \[0, 1\], got 1.5"):
        random.dropout(torch.ones(2), 1.5, random.key(0))
    with pytest.raises(ft.ArgumentError, match=r"4 keys for a tensor of shape \(3, 5\)"):
        random.dropout(torch.ones(3, 5), 0.5, random.split(random.key(0), 4))


@pytest.mark.parametrize("count", [1, 2, 7, 2 * random._BLOCK + 1, 2 * random._BLOCK + 2, 5 * random._BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_normal_numbers_have_the_bits_of_those_drawn_at_once(count, dtype):
    key = random.key(9)
    drawn = random.normal(key, (count,), dtype)
    # Inside a transform, and of keys with a shape, nothing is drawn block by block.
    same_bits("vmap", torch.func.vmap(lambda k: random.normal(k, (count,), dtype))(key[None])[0], drawn)
    same_bits("keys", random.normal(key[None], (count,), dtype)[0], drawn)
    same_bits("shaped", random.normal(key, (1, count, 1), dtype), drawn[None, :, None])


def test_the_two_normal_numbers_of_a_hash_are_independent():
    numbers = random.normal(random.key(4), (2 * COUNT,)).double()
    pairs = numbers.reshape(2, COUNT)
    for function in (lambda x: x, torch.square, torch.abs, torch.sign):
        values = function(pairs)
        for left, right in ((values[0], values[1]), (values[0, 1:], values[1, :-1])):
            assert abs((left * right).mean() - left.mean() * right.mean()) < 5 * left.std() * right.std() / math.sqrt(COUNT)
    # In polar coordinates: the angle is uniform, and half the squared radius exponential.
    turn = torch.atan2(pairs[1], pairs[0]) / (2 * math.pi) + 0.5
    spent = torch.exp(-pairs.square().sum(0) / 2)
    for uniform in (turn, spent):
        seen = torch.histc(uniform, 100, 0, 1)
        chi = ((seen - COUNT / 100) ** 2 / (COUNT / 100)).sum().item()
        assert abs(chi - 99) < 5 * math.sqrt(2 * 99)
