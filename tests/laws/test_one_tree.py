"""Law 2: association depends on the number of parts alone, and with exact=True so do the bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import LEAST_PARTS, REDUCERS, convolutional, images, net_batch, net_loss, net_params

import functrain as ft
from functrain.core.tree import depth
from functrain.testing import equal, same_bits


def leaf_depths(merged, level=0):
    if not isinstance(merged, tuple):
        return [level]
    return [deep for branch in merged for deep in leaf_depths(branch, level + 1)]


@given(st.integers(1, 300))
def test_one_tree_for_a_number_of_items(count):
    merged = ft.tree_reduce(lambda a, b: (a, b), range(count))
    assert max(leaf_depths(merged)) == depth(count) == (count - 1).bit_length()
    flat = str(merged).translate(str.maketrans("(),", "   ")).split()
    assert [int(item) for item in flat] == list(range(count))


@given(st.integers(1, 200))
def test_few_partial_results_are_alive_at_once(count):
    alive = most = 0

    def items():
        nonlocal alive, most
        for _ in range(count):
            alive += 1
            most = max(most, alive)
            yield 1

    def merge(a, b):
        nonlocal alive
        alive -= 1
        return a + b

    assert ft.tree_reduce(merge, items()) == count
    assert most <= depth(count) + 1


@given(size=st.integers(1, 20), parts=st.integers(1, 9))
def test_parts_are_contiguous_in_order_and_of_nearly_one_size(size, parts):
    batch = {"x": torch.arange(size), "y": (torch.arange(size)[:, None],)}
    cut = ft.tree.divide(batch, parts)
    sizes = [len(part["x"]) for part in cut]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == min(size, parts)
    same_bits("concat undoes divide", ft.tree.concat(cut), batch)


@pytest.mark.parametrize(("name", "parts"), [(name, parts) for name in REDUCERS for parts in (LEAST_PARTS.get(name, 1), 8)])
def test_exact_bits_do_not_depend_on_workers(name, parts):
    reducer = REDUCERS[name]
    torch.set_num_threads(2)
    params, loss = convolutional()
    batch, key = images(21), ft.random.key(5)
    plans = [("auto", 1), ("auto", 2), ("loop", 1), ("threads", 1), ("threads", 2), ("threads", 3), ("threads", 8)]
    results = [
        ft.parallel(ft.grad(loss), parts, reducer, how=how, workers=workers, exact=True).finished(params, batch, key=key)
        for how, workers in plans
    ]
    for plan, result in zip(plans, results):
        same_bits(f"{plan}", result, results[0])
    equal("not exact", ft.parallel(ft.grad(loss), parts, reducer).finished(params, batch, key=key), results[0])


def test_exact_steps_do_not_depend_on_workers():
    torch.set_num_threads(2)
    params, loss = convolutional()
    ends = []
    for workers in (1, 2, 3):
        grad = ft.parallel(ft.grad(loss), 4, workers=workers, exact=True)
        step = ft.step(grad, ft.optim.adam(1e-2))
        state = step.init(params, seed=3)
        for place in range(5):
            state, metrics = step(state, images(10, place))
        ends.append((state, metrics))
    same_bits("2 workers", ends[1], ends[0])
    same_bits("3 workers", ends[2], ends[0])


def test_exact_does_not_depend_on_the_callers_threads():
    grad = ft.parallel(ft.grad(net_loss), 4, workers=2, exact=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(grad(net_params(), net_batch(64)))
        assert torch.get_num_threads() == threads
    same_bits("caller's threads", *results)


@given(parts=st.integers(1, 8), size=st.integers(1, 12))
def test_the_result_is_the_tree_over_the_parts(parts, size):
    params, batch = net_params(), net_batch(size)
    whole = ft.grad(net_loss)
    by_hand = ft.tree_reduce(ft.reduce.add, [whole(params, part) for part in ft.tree.divide(batch, parts)])
    same_bits("by hand", ft.parallel(whole, parts, how="loop")(params, batch), by_hand)
