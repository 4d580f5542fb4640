"""Clipping follows torch.nn.utils and the paper's formula, and can be differentiated at zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import net_params, random_tree

import functrain as ft
from functrain.testing import equal, same_bits

TREE = {"w": (3, 4), "kernel": (2, 3, 2, 2), "v": (5,), "scalar": (), "empty": (0, 2)}
DTYPES = [torch.float64, torch.float32]


def passed(part, grads, params=None, **extra):
    params = grads if params is None else params
    return part.update(grads, part.init(params), params, **extra)[0]


def clipped_by_torch(clip, grads, *options):
    leaves, spec = ft.tree.flatten(ft.tree.map(torch.clone, grads))
    held = [leaf.clone() for leaf in leaves]
    for leaf, grad in zip(held, leaves):
        leaf.grad = grad
    clip(held, *options)
    return ft.tree.unflatten(spec, [leaf.grad for leaf in held])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=st.floats(1e-3, 1e3), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_value_and_norm_are_clipped_as_by_torch(dtype, size, seed, scale):
    grads = ft.tree.map(lambda leaf: leaf * scale, random_tree(TREE, seed, dtype))
    expected = clipped_by_torch(torch.nn.utils.clip_grad_value_, grads, size)
    same_bits("value", passed(ft.optim.clip(size), grads), expected)
    expected = clipped_by_torch(torch.nn.utils.clip_grad_norm_, grads, size)
    tolerance = size * (1e-12 if dtype == torch.float64 else 1e-5)
    equal("norm", passed(ft.optim.clip_by_norm(size), grads), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_of_half_precision_are_taken_in_float32(dtype):
    # The squares overflow float16, and bfloat16 would stop adding at 256.
    grads = {"w": torch.full((40, 40), 300.0, dtype=dtype), "scalar": torch.tensor(300.0, dtype=dtype)}
    found = passed(ft.optim.clip_by_norm(1601**0.5), grads)
    assert found["scalar"].dtype == dtype
    equal("norm", found, ft.tree.map(torch.ones_like, grads), 0.01)
    params = ft.tree.map(torch.ones_like, grads)
    equal("adaptive", passed(ft.optim.clip_adaptive(1.0), grads, params), params, 0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(ratio=st.floats(1e-3, 10), eps=st.floats(0, 3), seed=st.integers(0, 99))
def test_units_are_clipped_by_the_formula(dtype, ratio, eps, seed):
    params, grads = random_tree(TREE, seed, dtype), random_tree(TREE, seed + 1000, dtype)

    def formula(p, g):
        result, shape = g.double().numpy().copy(), (len(g), math.prod(g.shape[1:])) if g.ndim > 1 else (1, g.numel())
        # Views of the result.
        for row, unit in zip(result.reshape(shape), p.double().numpy().reshape(shape)):
            longest, length = ratio * max(np.sqrt((unit**2).sum()), eps), np.sqrt((row**2).sum())
            if length > longest:
                row *= longest / length
        return torch.tensor(result).to(dtype)

    found = passed(ft.optim.clip_adaptive(ratio, eps=eps), grads, params)
    equal("units", found, ft.tree.map(formula, params, grads), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("part", [ft.optim.clip_by_norm(0.5), ft.optim.clip_adaptive(0.5)], ids=["norm", "adaptive"])
def test_derivatives_at_zero_are_those_of_passing_on(part):
    params = torch.ones(3, 2, dtype=torch.float64)

    def through(grads):
        return passed(part, grads, params)

    zero = torch.zeros_like(params)
    eye = torch.eye(6, dtype=torch.float64).reshape(3, 2, 3, 2)
    equal("reverse", torch.func.jacrev(through)(zero), eye)
    equal("forward", torch.func.jacfwd(through)(zero), eye)
    equal("second", torch.func.jacrev(torch.func.jacrev(through))(zero), torch.zeros(3, 2, 3, 2, 3, 2).double())
    equal("by zero params", torch.func.grad(lambda p: passed(part, params, p).sum())(zero), zero)


def test_what_is_not_finite_stays_visible():
    grads = {"a": torch.tensor([torch.nan, 5.0]), "b": torch.tensor([torch.inf])}
    found = passed(ft.optim.clip(1.0), grads)
    assert found["a"].isnan().tolist() == [True, False]
    assert found["b"].tolist() == [1.0]
    norm = passed(ft.optim.clip_by_norm(1.0), {"a": grads["a"], "b": torch.ones(1)})
    assert all(leaf.isnan().all() for leaf in norm.values())
    adaptive = passed(ft.optim.clip_adaptive(1.0), grads)
    assert adaptive["a"].isnan().any()


def test_a_norm_on_a_schedule_is_that_of_the_count():
    part, grads = ft.optim.clip_by_norm(ft.optim.piecewise(4.0, {2: 0.5})), torch.full((4,), 100.0, dtype=torch.float64)
    state, sizes = part.init(grads), []
    for _ in range(4):
        updates, state = part.update(grads, state, grads)
        sizes.append(updates.norm().item())
    assert sizes == pytest.approx([4, 4, 2, 2])
    updates, _ = part.update(grads, ft.with_hyper(part.init(grads), norm_start=8.0), grads)
    assert updates.norm().item() == pytest.approx(8)


def test_no_leaves_are_no_error():
    for part in (ft.optim.clip(1.0), ft.optim.clip_by_norm(1.0), ft.optim.clip_adaptive(), ft.optim.noise(1.0)):
        assert passed(part, {}, {}, **({"key": ft.random.key(0)} if part.uses else {})) == {}


@pytest.mark.parametrize("wrong", [0, 0.0, -1.0, math.nan, math.inf, "1", True, None])
def test_refusals(wrong):
    for name, make in (("value", ft.optim.clip), ("norm", ft.optim.clip_by_norm), ("ratio", ft.optim.clip_adaptive)):
        with pytest.raises(ft.ArgumentError, match=f"{name} must be a number"):
            make(wrong)
    if wrong != 0:
        with pytest.raises(ft.ArgumentError, match="eps must be a number"):
            ft.optim.clip_adaptive(0.1, eps=wrong)


def test_trees_that_differ_are_told():
    params = net_params()
    part = ft.optim.clip_by_norm(1.0)
    with pytest.raises(ft.TreeError, match=r"missing 'hidden\.w'"):
        part.update({**params, "hidden": {"b": params["hidden"]["b"]}}, part.init(params), params)
    with pytest.raises(ft.TreeError, match="'scale' has shape"):
        part.update({**params, "scale": torch.ones(2)}, part.init(params), params)
    with pytest.raises(ft.TreeError, match="'count' is "):
        part.init({"count": torch.tensor(1)})
    with pytest.raises(ft.TreeError, match="expected the PartState"):
        part.update(params, ft.optim.sgd(0.1).init(params), params)
