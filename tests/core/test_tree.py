"""Trees: named, joined, cut and folded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import net_params

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.testing import same_bits

LEAVES = st.builds(
    lambda shape, dtype: (torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) / 3).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool]),
)
TREES = st.recursive(
    LEAVES | st.none(),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(TREES)
def test_names_are_unique_and_in_order(some):
    names = tree.paths(some)
    assert len(set(names)) == len(names) == len(tree.leaves(some))
    same_bits("named", list(tree.named(some).values()), tree.leaves(some))


@given(TREES)
def test_ravel_round_trips(some):
    vector, unravel = tree.ravel(some)
    assert vector.ndim == 1
    same_bits("ravel", unravel(vector), some)
    with pytest.raises(TreeError, match="elements: expected"):
        unravel(torch.zeros(len(vector) + 1))


@given(TREES, st.integers(1, 4))
def test_stack_round_trips(some, count):
    members = [tree.map(lambda leaf, n=n: (leaf * (n + 1)).to(leaf.dtype), some) for n in range(count)]
    if tree.leaves(some):
        got = tree.unstack(tree.stack(members))
        assert len(got) == count
        for member, back in zip(members, got):
            same_bits("stack", back, member)


def test_ravel_refuses_what_it_cannot_hold():
    with pytest.raises(TreeError, match="int64 next to other dtypes"):
        tree.ravel({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.int64)})


def test_ravel_is_differentiable():
    params = net_params()

    def length(scale):
        vector, unravel = tree.ravel(tree.map(lambda leaf: leaf * scale, params))
        return tree.ravel(unravel(vector))[0].square().sum()

    one = torch.tensor(1.0)
    torch.testing.assert_close(torch.func.grad(length)(one), 2 * length(one))


def test_weights_have_two_dimensions():
    assert set(tree.weights(net_params())) == {"hidden.w", "out.0"}


def test_trees_that_do_not_fit_say_where():
    left, right = {"a": {"x": torch.ones(1), "y": torch.ones(1)}}, {"a": {"x": torch.ones(1), "z": torch.ones(1)}}
    with pytest.raises(TreeError, match=r"missing 'a.y'; unexpected 'a.z'"):
        tree.map(torch.add, left, right)
    with pytest.raises(TreeError, match="containers of different types"):
        tree.map(torch.add, (torch.ones(1),), [torch.ones(1)])
    with pytest.raises(TreeError, match=r"two leaves have the name 'a.b'"):
        tree.paths({"a": {"b": 1}, "a.b": 2})


def test_sizes():
    with pytest.raises(TreeError, match=r"same first dimension N; got x: \(3, 2\), y.0: \(4,\)"):
        tree.batch_size({"x": torch.zeros(3, 2), "y": [torch.zeros(4)]})
    with pytest.raises(TreeError, match=r"same first dimension N; got x: \(\)"):
        tree.batch_size({"x": torch.tensor(1.0)})
    for empty in ({}, (), None):
        with pytest.raises(TreeError, match="no leaves"):
            tree.batch_size(empty)
    with pytest.raises(TreeError, match=r"empty \(N = 0\)"):
        tree.part_sizes(0, 2)
    with pytest.raises(ArgumentError, match="parts must be at least 1"):
        tree.part_sizes(3, 0)
    for function in (tree.stack, tree.concat, lambda items: tree.tree_reduce(torch.add, items)):
        with pytest.raises(ArgumentError, match="at least one"):
            function([])
