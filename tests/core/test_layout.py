"""Layouts do what optree does, for every structure; and tell structures apart."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.core.layout import Layout, Memo, order

Pair = namedtuple("Pair", "left right")
leaves = st.builds(lambda: torch.zeros(()))
trees = st.recursive(
    leaves | st.none(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.just("it's \"quoted\"\n"), inner, max_size=3),
        st.dictionaries(st.integers(-2, 2) | st.booleans(), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=2).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
def test_a_layout_flattens_and_builds_as_optree_does(tree):
    flat, spec = optree.tree_flatten(tree)
    layout = Layout(tree)
    found = layout.leaves(tree)
    assert found is not None
    assert [id(leaf) for leaf in found] == [id(leaf) for leaf in flat]
    numbers = list(range(len(flat)))
    built = layout.built(numbers)
    assert built == optree.tree_unflatten(spec, numbers)
    assert optree.tree_structure(built) == spec


@given(trees, trees)
def test_a_memo_is_never_taken_in_by_another_structure(first, second):
    memo = Memo()
    for tree in (first, second, first, second):
        flat, layout = memo.flatten(tree)
        expected, spec = optree.tree_flatten(tree)
        assert [id(leaf) for leaf in flat] == [id(leaf) for leaf in expected]
        assert layout.spec == spec
        assert order(layout.built(flat)) == order(tree)


@pytest.mark.parametrize(
    "other",
    [
        {"a": 1, "c": 2},
        {"a": 1},
        {"a": 1, "b": 2, "c": 3},
        [1, 2],
        OrderedDict(a=1, b=2),
        None,
        7,
    ],
    ids=repr,
)
def test_a_tree_of_another_structure_has_no_leaves_in_a_layout(other):
    assert Layout({"a": 1, "b": 2}).leaves(other) is None


def test_a_named_tuple_is_no_tuple():
    assert Layout(Pair(1, 2)).leaves((1, 2)) is None
    assert Layout((1, 2)).leaves(Pair(1, 2)) is None
    assert Layout({"a": None}).leaves({"a": 1}) is None


def test_keys_in_another_order_are_another_tree_to_a_loss():
    def loss(params, batch):
        for weight in params.values():
            batch = batch * weight + 1
        return batch

    first = {"in": torch.tensor(2.0), "a": torch.tensor(3.0)}
    second = {"a": first["a"], "in": first["in"]}
    grad = ft.grad(loss)
    assert [grad(params, torch.ones(1)).loss.item() for params in (second, first, second)] == [9, 10, 9]


def test_trees_may_be_nested_deeply():
    tree = torch.ones(())
    for _ in range(250):
        tree = {"in": tree}
    layout = Layout(tree)
    assert layout.built(layout.leaves(tree)) == tree
