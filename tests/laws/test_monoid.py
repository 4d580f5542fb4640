"""Law 3: reducers are monoids: merge is associative and has an identity; finish(lift(x)) is x for the mean."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LEAST_PARTS, REDUCERS, net_batch, net_loss, net_params

import functrain as ft
from functrain.core import reduce
from functrain.core.errors import LossError
from functrain.testing import LawError, check_reducer, equal, same_bits

DTYPES = st.sampled_from([torch.float32, torch.float64])


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=list(REDUCERS))
def test_every_reducer_is_a_monoid(reducer):
    check_reducer(reducer)


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=list(REDUCERS))
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 5), min_size=5, max_size=7), seed=st.integers(0, 99), dtype=DTYPES)
def test_every_reducer_over_nested_params_and_ragged_parts(reducer, sizes, seed, dtype):
    params = net_params(seed, dtype)
    taken = [ft.grad(net_loss)(params, net_batch(size, seed + n, dtype)) for n, size in enumerate(sizes)]
    check_reducer(reducer, taken)


@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_nothing_is_the_identity_and_one_part_is_itself(size, seed):
    gradient = ft.grad(net_loss)(net_params(seed), net_batch(size, seed))
    same_bits("None + g", reduce.add(None, gradient), gradient)
    same_bits("g + None", reduce.add(gradient, None), gradient)
    assert reduce.add(None, None) is None
    single = ft.Gradient({"w": torch.tensor([2.0])}, torch.tensor(3.0), torch.tensor(1.0, dtype=torch.float64))
    same_bits("finish(lift(x))", reduce.mean.finish(reduce.mean.lift(single)), single)


def test_the_sum_is_the_mean_times_the_weight():
    gradient = ft.grad(net_loss)(net_params(), net_batch(6))
    mean, total = reduce.mean.finish(gradient), reduce.sum.finish(gradient)
    equal("sum", total.grads, ft.tree.map(lambda leaf: leaf * mean.weight.to(leaf.dtype), mean.grads))


def larger(a, b):
    return ft.tree.map(lambda x, y: torch.where(a.loss >= b.loss, x, y), a, b)


def test_a_reducer_that_is_not_linear_sees_the_parts():
    worst = ft.Reducer("worst", merge=larger, finish=reduce.mean.finish)
    check_reducer(worst)
    params, batch = net_params(), net_batch(9)
    parts = [ft.grad(net_loss)(params, part) for part in ft.tree.divide(batch, 3)]
    expected = reduce.mean.finish(max(parts, key=lambda part: part.loss.item()))
    for how in ("auto", "loop", "threads", "vmap"):
        equal(how, ft.parallel(ft.grad(net_loss), 3, worst, how=how).finished(params, batch), expected)


@pytest.mark.parametrize("name", REDUCERS)
@settings(max_examples=6)
@given(size=st.integers(1, 14), seed=st.integers(0, 99), dtype=DTYPES)
def test_every_reducer_in_every_plan(name, size, seed, dtype):
    params, batch, key = net_params(seed, dtype), net_batch(size, seed, dtype), ft.random.key(seed)
    parts = 7
    if min(size, parts) < LEAST_PARTS.get(name, 1):
        with pytest.raises(LossError, match="parts"):
            ft.parallel(ft.grad(net_loss), parts, REDUCERS[name]).finished(params, batch, key=key)
        return
    results = [
        ft.parallel(ft.grad(net_loss), parts, REDUCERS[name], how=how, workers=2).finished(params, batch, key=key)
        for how in ("auto", "loop", "threads", "vmap")
    ]
    # A selection (Krum's) may tip over where two parts are nearly alike: then both are within rounding of each other.
    tolerance = 1e-3 if dtype == torch.float32 else None
    for result in results[1:]:
        equal(name, result, results[0], tolerance)
        assert [leaf.dtype for leaf in ft.tree.leaves(result.grads)] == [dtype] * len(ft.tree.leaves(params))


def _counted(total):
    return reduce.mean.finish(total)._replace(loss=total.loss + next(COUNTER))


def altered(change):
    """The mean, but for one thing in what it gives."""
    return dataclasses.replace(reduce.mean, linear=False, finish=lambda total: change(reduce.mean.finish(total)))


def limits(like):
    return [ft.tree.map(lambda leaf, sign=sign: torch.full_like(leaf, sign * 1000.0), like) for sign in (-1, 1)]


COUNTER = itertools.count()
BROKEN = {
    "associative": dataclasses.replace(reduce.mean, merge=lambda a, b: ft.tree.map(lambda x, y: x + 2 * y, a, b)),
    "changes nothing": dataclasses.replace(reduce.mean, merge=lambda a, b: ft.tree.map(lambda x, y: x.add_(y), a, b)),
    "linear": ft.Reducer("worst", merge=larger, finish=reduce.mean.finish, linear=True),
    "the same again": ft.Reducer("counting", merge=reduce.add, finish=lambda total: _counted(total)),
    "of examples": dataclasses.replace(reduce.mean, linear=False, scale=torch.ones_like, lift=lambda g: reduce.add(g, g)),
    "grads are like params": altered(lambda result: result._replace(grads=ft.tree.map(torch.atleast_2d, result.grads))),
    "like params": altered(lambda result: result._replace(grads=ft.tree.map(torch.Tensor.float, result.grads))),
    "0-d loss": altered(lambda result: result._replace(loss=result.loss.reshape(1))),
    "0-d weight": altered(lambda result: result._replace(weight=None)),
    "keeps the weight": altered(lambda result: result._replace(weight=0 * result.weight)),
    "keeps the measures": altered(lambda result: result._replace(aux=None)),
    "merging adds": dataclasses.replace(reduce.mean, merge=lambda a, b: ft.tree.map(torch.clamp, reduce.add(a, b), *limits(a))),
    "finish gives a Gradient": dataclasses.replace(reduce.mean, finish=lambda total: total.grads),
}


@pytest.mark.parametrize("law", BROKEN)
def test_the_checker_names_the_law_that_is_broken(law):
    with pytest.raises(LawError, match=law):
        check_reducer(BROKEN[law])
