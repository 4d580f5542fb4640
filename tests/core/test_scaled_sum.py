"""scaled_sum: Σᵢ s(‖gᵢ‖) gᵢ, without the gradients of the examples being there wherever algebra can do without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from example_losses import CASES, by_hand, norms_of
from hypothesis import given
from hypothesis import strategies as st
from instances import convolutional, images, keyed_loss, net_batch, net_loss, net_params, random_tree, recurrent
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain.core.examples import example_grads, scaled_sum
from functrain.core.reduce.base import add, mean_of


def clip(bound):
    return lambda norms: (bound / norms.clamp_min(1e-30)).clamp(max=1)


def expected(grads, scales):
    """Σᵢ sᵢ gᵢ in float64."""
    return ft.tree.map(lambda leaf: torch.tensordot(scales.double(), leaf.double(), 1), grads)


def distance(got, want):
    """‖got − want‖ / ‖want‖ over all leaves together."""
    square = lambda pairs: sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)  # noqa: E731
    got, want = ft.tree.leaves(got), ft.tree.leaves(want)
    return (square(zip(got, want)) / (square((b, torch.zeros_like(b)) for b in want) + 1e-60)) ** 0.5


@pytest.mark.parametrize("budget", [None, 1, 3000])
@pytest.mark.parametrize("name", CASES)
def test_the_sum_and_the_norms_are_those_of_the_examples_gradients(name, budget):
    params, loss, batch, *_ = CASES[name]
    grads, losses = by_hand(loss, params, batch)
    norms = norms_of(grads)
    bound, seen = norms.median(), []

    def scale(norms):
        seen.append(norms)
        return clip(bound)(norms)

    total = scaled_sum(ft.grad(loss), params, batch, scale=scale, budget=budget)
    torch.testing.assert_close(torch.cat(seen), norms, rtol=1e-10, atol=1e-13)
    assert distance(total.grads, expected(grads, clip(bound)(norms))) < 1e-10
    torch.testing.assert_close(total.loss, losses.sum())
    assert total.carry is None
    shapes = [(leaf.shape, leaf.dtype) for leaf in ft.tree.leaves(params)]
    assert [(leaf.shape, leaf.dtype) for leaf in ft.tree.leaves(total.grads)] == shapes
    assert ft.tree.same_structure(total.grads, params)


def test_a_linear_layer_by_its_formula():
    params, batch = random_tree({"w": (3, 2), "b": (2,)}, 0), random_tree({"x": (6, 3), "y": (6, 2)}, 1)
    grad = ft.grad(lambda p, b: (b["x"] @ p["w"] + p["b"] - b["y"]).square())
    total = scaled_sum(grad, params, batch, scale=clip(5.0))
    x, y, w, b = (value.numpy().astype(np.float64) for value in (batch["x"], batch["y"], params["w"], params["b"]))
    delta = 2 * (x @ w + b - y)
    norms = np.sqrt((delta**2).sum(1) * ((x**2).sum(1) + 1))
    scales = np.minimum(1, 5 / norms)
    assert (scales == 1).any()
    assert (scales < 1).any()
    np.testing.assert_allclose(total.grads["w"], np.einsum("n,ni,no->io", scales, x, delta), rtol=1e-5)
    np.testing.assert_allclose(total.grads["b"], scales @ delta, rtol=1e-5)


@given(
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, 1, 100, 300]),
)
def test_nested_trees_weights_aux_and_ragged_chunks(size, seed, dtype, budget):
    params, batch = net_params(seed, dtype), net_batch(size, seed, dtype)
    alone = [ft.grad(net_loss)(params, ft.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(size)]
    grads = ft.tree.stack([one.grads for one in alone])
    norms = norms_of(grads)
    total = scaled_sum(ft.grad(net_loss), params, batch, scale=clip(norms.mean()), budget=budget)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    assert distance(total.grads, expected(grads, clip(norms.mean())(norms))) < tolerance
    whole = ft.grad(net_loss)(params, batch)
    torch.testing.assert_close((total.loss, total.aux), (whole.loss, whole.aux))
    torch.testing.assert_close(total.weight, whole.weight)


@pytest.mark.parametrize("budget", [None, 1, 2000])
def test_randomness_and_lanes_of_carry(budget):
    key = ft.random.key(3)
    params, batch = net_params(), net_batch(6)
    rows = example_grads(ft.grad(keyed_loss), params, batch, key=key)
    total = scaled_sum(ft.grad(keyed_loss), params, batch, scale=clip(1.0), key=key, budget=budget)
    assert distance(total.grads, expected(rows.grads, clip(1.0)(norms_of(rows.grads)))) < 1e-6

    params, loss, _ = recurrent()
    batch = random_tree({"x": (4, 3, 3), "y": (4, 3, 2)}, 5)
    grad, carry = ft.grad(loss, lanes=True), random_tree([(4, 5), (4, 5)], 6)
    rows = example_grads(grad, params, batch, carry=carry)
    total = scaled_sum(grad, params, batch, scale=clip(0.5), carry=carry, budget=budget)
    assert distance(total.grads, expected(rows.grads, clip(0.5)(norms_of(rows.grads)))) < 1e-6
    torch.testing.assert_close(total.carry, grad(params, batch, carry=carry).carry)


def test_a_scale_of_one_is_the_batchs_gradient():
    params, loss = convolutional()
    batch, key = images(9), ft.random.key(1)
    total = scaled_sum(ft.grad(loss), params, batch, scale=torch.ones_like, key=key)
    assert distance(total.grads, ft.grad(loss)(params, batch, key=key).grads) < 1e-6


def test_no_gradients_at_all_have_norm_zero():
    seen = []
    total = scaled_sum(
        ft.grad(lambda p, b: b.square()),
        {"w": torch.ones(2, 2)},
        torch.ones(3),
        scale=lambda norms: seen.append(norms) or norms,
    )
    assert torch.equal(seen[0], torch.zeros(3))
    assert torch.equal(total.grads["w"], torch.zeros(2, 2))
    assert total.loss == 3


# --- precision ------------------------------------------------------------------------------------------------------


def digits_networks():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )
    cnn = nn.Sequential(*cnn, nn.Flatten(), nn.Linear(32 * 9, 10))
    yield "mlp", mlp, torch.randn(32, 64)
    yield "cnn", cnn, torch.randn(32, 1, 12, 12)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_float32_agrees_with_float64_to_a_millionth(name):
    _, module, x = next(row for row in digits_networks() if row[0] == name)
    params, apply = ft.functional(module)

    def loss(params, batch):
        return F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")

    batch = {"x": x, "y": torch.arange(32) % 10}
    grads, _ = by_hand(loss, ft.tree.map(torch.Tensor.double, params), batch | {"x": x.double()})
    bound = norms_of(grads).median()
    total = scaled_sum(ft.grad(loss), params, batch, scale=clip(bound.float()))
    assert distance(total.grads, expected(grads, clip(bound)(norms_of(grads)))) < 1e-6


def test_short_dtypes_are_added_up_in_float32():
    # 300² does not fit float16, and 1/3 rounded to bfloat16 is too large by 0.13 %.
    batch = torch.full((1, 4096), 2.0, dtype=torch.float16)
    seen = []
    scaled_sum(
        ft.grad(lambda p, b: (b * p).sum(1)),
        torch.full((4096,), 150.0, dtype=torch.float16),
        batch * 150,
        scale=lambda norms: seen.append(norms) or norms,
    )
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], torch.tensor([300.0 * 64]))

    ones = torch.ones(1, 64, dtype=torch.bfloat16)
    total = scaled_sum(ft.grad(lambda p, b: (b * p).sum(1)), ones[0] * 3, ones * 3, scale=lambda norms: 1 / norms)
    assert total.grads.dtype == torch.bfloat16
    torch.testing.assert_close(total.grads, torch.full((64,), 0.125, dtype=torch.bfloat16), rtol=0, atol=0)


# --- what is never computed -----------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Every shape that an operation has given in memory (an expanded view has none of its own)."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in ft.tree.leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen |= {tuple(leaf.shape) for leaf in given if leaf.untyped_storage().nbytes() >= leaf.nbytes}
        return result


def linear_case(*positions):
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(37, 41), nn.Tanh(), nn.Linear(41, 43)))
    return params, (lambda p, b: apply(p, b).flatten(1).square()), torch.randn(29, *positions, 37)


@pytest.mark.parametrize("positions", [(), (3,)])
def test_no_gradient_of_an_example_is_computed_for_a_linear_layer(positions):
    params, loss, batch = linear_case(*positions)
    with Shapes() as shapes:
        scaled_sum(ft.grad(loss), params, batch, scale=clip(1.0))
    sizes = {29 * 37 * 41, 29 * 41 * 43}
    assert not {shape for shape in shapes.seen if np.prod(shape, dtype=int) in sizes}
    with Shapes() as shapes:
        example_grads(ft.grad(loss), params, batch)
    assert {np.prod(shape, dtype=int) for shape in shapes.seen} >= sizes


def test_the_budget_bounds_how_many_gradients_are_alive_at_once():
    # Expanded, over windows, and over many positions: what is computed example by example, in blocks of three.
    cases = {
        "expanded": (torch.randn(30, 20), lambda p, b: (b @ (p * 2)).square(), torch.randn(10, 30)),
        "linear": (torch.randn(30, 20), lambda p, b: (b @ p).square(), torch.randn(10, 40, 30)),
        "convolution": (torch.randn(20, 30, 1), lambda p, b: F.conv1d(b, p).square(), torch.randn(10, 30, 40)),
    }
    for name, (params, loss, batch) in cases.items():
        whole = scaled_sum(ft.grad(loss), params, batch, scale=clip(1.0))
        with Shapes() as shapes:
            cut = scaled_sum(ft.grad(loss), params, batch, scale=clip(1.0), budget=3 * 600 * 4 + 1)
        assert distance(cut.grads, whole.grads) < 1e-6, name
        rows = {shape[0] for shape in shapes.seen if shape[1:] in ((30, 20), (20, 30), (20, 30, 1))}
        assert rows == {3, 1}, name


# --- inside other things --------------------------------------------------------------------------------------------


def test_a_traced_sum_is_the_same_and_computes_no_gradient_of_an_example():
    params, loss, batch = linear_case()
    spec = ft.tree.structure(params)

    def flat(batch, *leaves):
        return ft.tree.leaves(scaled_sum(ft.grad(loss), ft.tree.unflatten(spec, leaves), batch, scale=clip(1.0)).grads)

    leaves = ft.tree.leaves(params)
    with torch.no_grad():
        graph = make_fx(flat, tracing_mode="fake")(batch, *leaves)
    sizes = [value.numel() for node in graph.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    assert not {29 * 37 * 41, 29 * 41 * 43} & set(sizes)
    other = ft.tree.map(lambda leaf: leaf * 1.1 + 0.01, leaves)
    assert distance(graph(batch * 2, *other), flat(batch * 2, *other)) < 1e-6


def test_a_traced_convolution_and_a_loss_that_cannot_be_recorded():
    params, loss = convolutional()
    key, batch = ft.random.key(0), images(4)

    def convolved(x, y, *leaves):
        given = ft.tree.unflatten(ft.tree.structure(params), leaves)
        return ft.tree.leaves(scaled_sum(ft.grad(loss), given, {"x": x, "y": y}, scale=clip(1.0), key=key).grads)

    weights, recurrence, _ = recurrent()

    def looped(x, y, h, c, *leaves):
        given = ft.tree.unflatten(ft.tree.structure(weights), leaves)
        grad = ft.grad(recurrence, lanes=True)
        return ft.tree.leaves(scaled_sum(grad, given, {"x": x, "y": y}, scale=clip(1.0), carry=(h, c)).grads)

    for function, inputs in (
        (convolved, [batch["x"], batch["y"], *ft.tree.leaves(params)]),
        (looped, [*random_tree([(2, 2, 3), (2, 2, 2), (2, 5), (2, 5)], 0), *ft.tree.leaves(weights)]),
    ):
        with torch.no_grad():
            graph = make_fx(function)(*inputs)
        assert distance(graph(*inputs), function(*inputs)) < 1e-6


def test_in_a_compiled_step():
    params, batch = random_tree({"w": (4, 3), "b": (3,)}, 0), random_tree((6, 4), 1)
    clipped = ft.Reducer("clipped", merge=add, finish=mean_of, scale=clip(1.0))
    grad = ft.grad(lambda p, b: (b @ p["w"] + p["b"]).square().sum(1))
    step = ft.step(ft.parallel(grad, 1, clipped), ft.optim.sgd(0.1))
    state = step.init(params)
    compiled, _ = ft.compiled(step, donate=False).update(state, batch)
    plain, _ = step.update(state, batch)
    assert distance(compiled.params, plain.params) < 1e-6


def test_under_vmap_over_params():
    grad, batch = ft.grad(net_loss), net_batch(3)
    stacked = ft.tree.stack([net_params(seed) for seed in range(2)])
    leaves, spec = ft.tree.flatten(stacked)

    def one(*leaves):
        return tuple(ft.tree.leaves(scaled_sum(grad, ft.tree.unflatten(spec, leaves), batch, scale=clip(1.0)).grads))

    together = torch.func.vmap(one)(*leaves)
    for place in range(2):
        alone = scaled_sum(grad, net_params(place), batch, scale=clip(1.0)).grads
        assert distance([leaf[place] for leaf in together], alone) < 1e-6
