"""example_grads: each example's gradient is what that example alone has, whichever algebra finds it."""

from __future__ import annotations

import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from example_losses import CASES, N, by_hand, of_module
from hypothesis import assume, given
from hypothesis import strategies as st
from instances import convolutional, images, keyed_loss, net_batch, net_loss, net_params, random_tree, recurrent
from torch import nn

import functrain as ft
from functrain.core.errors import LossError, TreeError
from functrain.core.examples import example_grads, plan_of

SMALL = [None, 1, 3000]


def close(got, expected, tolerance=1e-10):
    assert ft.tree.same_structure(got, expected)
    for path, a, b in zip(ft.tree.paths(expected), ft.tree.leaves(got), ft.tree.leaves(expected)):
        assert a.shape == b.shape, path
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-30, path


@pytest.mark.parametrize("budget", SMALL)
@pytest.mark.parametrize("name", CASES)
def test_each_example_has_the_gradient_that_it_has_alone(name, budget):
    params, loss, batch, *_ = CASES[name]
    grads, losses = by_hand(loss, params, batch)
    taken = example_grads(ft.grad(loss), params, batch, budget=budget)
    close(taken.grads, grads)
    close(taken.loss, losses)
    assert not any(leaf.requires_grad for leaf in ft.tree.leaves(taken))


@pytest.mark.parametrize("name", CASES)
def test_the_algebra_is_the_one_that_is_told(name):
    params, loss, batch, leaf, algebra = CASES[name]
    told = plan_of(ft.grad(loss), params, batch)
    assert list(told) == ft.tree.paths(params)
    assert told[leaf].split(":")[0] == algebra


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("used twice", "linear: norms from products of 2 × 2 positions"),
        ("cell over time", f"linear: a gradient for each example, summed over {2 * N} positions"),
        ("linear over little time", "linear: norms from products of 2 × 2 positions"),
        ("tied embedding", "embedding and linear: used 2 times, a gradient for each example"),
        ("unseen operation", "all leaves: a gradient for each example, one after the other"),
        ("a param alone", "all leaves: a gradient for each example, by vmap over the gradient"),
    ],
)
def test_uses_are_joined_where_they_can_be(name, words):
    params, loss, batch, leaf, _ = CASES[name]
    assert plan_of(ft.grad(loss), params, batch)[leaf] == words


def test_the_algebra_of_a_network_in_words():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    params, apply = ft.functional(module)
    grad = ft.grad(lambda p, b: apply(p, b).square())
    assert plan_of(grad, params, torch.randn(3, 1, 6, 6)) == {
        "0.bias": "shift: a gradient for each example, sums of output gradients",
        "0.weight": "convolution: a gradient for each example, over windows",
        "2.bias": "shift: a gradient for each example, sums of output gradients",
        "2.weight": "linear: norms from activations and output gradients",
    }


def test_a_linear_layer_by_its_formula():
    params, batch = random_tree({"w": (3, 2), "b": (2,)}, 0), random_tree({"x": (4, 3), "y": (4, 2)}, 1)
    taken = example_grads(ft.grad(lambda p, b: (b["x"] @ p["w"] + p["b"] - b["y"]).square()), params, batch)
    x, y, w, b = (value.numpy().astype(np.float64) for value in (batch["x"], batch["y"], params["w"], params["b"]))
    delta = 2 * (x @ w + b - y)
    np.testing.assert_allclose(taken.grads["w"], np.einsum("ni,no->nio", x, delta), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(taken.grads["b"], delta, rtol=1e-5, atol=1e-6)


# --- the whole contract of a loss -----------------------------------------------------------------------------------


def test_weights_aux_and_losses_of_any_shape():
    params, batch = net_params(dtype=torch.float64), net_batch(N, dtype=torch.float64)
    taken = example_grads(ft.grad(net_loss), params, batch)
    alone = [ft.grad(net_loss)(params, ft.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(N)]
    close((taken.grads, taken.loss, taken.aux), ft.tree.stack([(one.grads, one.loss, one.aux) for one in alone]))
    assert torch.equal(taken.weight, batch["weight"])

    twice = example_grads(ft.grad(lambda p, b: torch.stack([b["x"][:, 0], b["x"][:, 1] * p["scale"]], 1)), params, batch)
    assert torch.equal(twice.weight, torch.full((N,), 2.0, dtype=torch.float64))
    close(twice.grads["scale"], batch["x"][:, 1])


@pytest.mark.parametrize("budget", SMALL)
def test_keyed_dropout_is_the_same_for_the_same_example(budget):
    key = ft.random.key(3)
    params, loss = convolutional()
    keys = ft.random.example_keys(key, 7)
    for taken_loss, taken_params, batch in ((loss, params, images(7)), (keyed_loss, net_params(), net_batch(7))):
        grad = ft.grad(taken_loss)
        parts = [ft.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(7)]
        alone = ft.tree.stack([grad(taken_params, part, key=keys[i : i + 1]).grads for i, part in enumerate(parts)])
        close(example_grads(grad, taken_params, batch, key=key, budget=budget).grads, alone, 2e-6)


@pytest.mark.parametrize("budget", [None, 2000])
def test_lanes_of_carry_and_an_lstm_that_nothing_can_map(budget):
    params, loss, _ = recurrent()
    batch = random_tree({"x": (N, 4, 3), "y": (N, 4, 2)}, 5)
    grad, carry = ft.grad(loss, lanes=True), random_tree([(N, 5), (N, 5)], 6)
    taken = example_grads(grad, params, batch, carry=carry, budget=budget)
    for place in range(N):
        part, lane = ft.tree.map(lambda leaf, place=place: leaf[place : place + 1], (batch, carry))
        alone = grad(params, part, carry=lane)
        row = ft.tree.map(lambda leaf, place=place: leaf[place], (taken.grads, taken.loss))
        close(row, (alone.grads, alone.loss), 1e-5)
        close(ft.tree.map(lambda leaf, place=place: leaf[place : place + 1], taken.carry), alone.carry, 1e-5)
    assert set(plan_of(grad, params, batch, carry=carry).values()) == {
        "all leaves: a gradient for each example, one after the other"
    }


def test_lanes_of_carry_through_a_cell_of_ones_own():
    def loss(params, batch, *, carry):
        hidden = torch.tanh(batch["x"] @ params["a"] + carry @ params["u"])
        return hidden.square(), hidden

    params = random_tree({"a": (3, 4), "u": (4, 4)}, 0, torch.float64)
    batch, carry = random_tree(({"x": (N, 3)}), 1, torch.float64), random_tree((N, 4), 2, torch.float64)
    grad = ft.grad(loss, lanes=True)
    taken = example_grads(grad, params, batch, carry=carry)
    close(taken.grads, by_hand(lambda p, b: loss(p, b, carry=b["carry"])[0], params, batch | {"carry": carry})[0])
    close(taken.carry, grad(params, batch, carry=carry).carry)
    assert not taken.carry.requires_grad


def test_other_gradients_are_taken_example_by_example_too():
    def loss(params, x, *, carry):
        hidden = torch.tanh(x @ params + carry)
        return hidden.square().sum(2), hidden[:, -1]

    params, x = random_tree((3, 3), 0, torch.float64), random_tree((N, 4, 3), 1, torch.float64)
    windowed = ft.tbptt(ft.grad(lambda p, b, *, carry: loss(p, b, carry=carry[:, None])), 2, lambda x: x.new_zeros(len(x), 3))
    alone = torch.stack([windowed(params, x[i : i + 1]).grads for i in range(N)])
    close(example_grads(windowed, params, x).grads, alone)


# --- shapes and dtypes, drawn ---------------------------------------------------------------------------------------


@given(st.data())
def test_convolutions_of_any_geometry(data):
    dims = data.draw(st.integers(1, 3), label="dims")
    groups = data.draw(st.integers(1, 2), label="groups")
    wide, high = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    each = st.tuples(*(st.integers(1, 3) for _ in range(dims)))
    kernel, stride, dilation = (data.draw(each, label=name) for name in ("kernel", "stride", "dilation"))
    padding = data.draw(st.one_of(st.integers(0, 2), each, st.just("valid"), st.just("same")), label="padding")
    if padding == "same":
        stride = (1,) * dims
        # Torch itself warns of others.
        assume(all(step * (size - 1) % 2 == 0 for step, size in zip(dilation, kernel)))
    space = tuple(data.draw(st.integers(7, 9)) for _ in range(dims))
    bias, dtype = data.draw(st.booleans()), data.draw(st.sampled_from([torch.float32, torch.float64]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(wide, high, kernel, stride, padding, dilation, groups, bias)
    case = of_module(module, random_tree((3, wide, *space), 1, torch.float64), "weight", "convolution")
    params, batch = ft.tree.map(lambda leaf: leaf.to(dtype), (case.params, case.batch))
    taken = example_grads(ft.grad(case.loss), params, batch)
    close(taken.grads, by_hand(case.loss, case.params, case.batch)[0], 1e-10 if dtype == torch.float64 else 1e-4)
    assert plan_of(ft.grad(case.loss), params, batch)["weight"].startswith("convolution")


@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.lists(st.integers(1, 4), max_size=2),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 4000),
)
def test_matrices_of_any_size_over_any_positions(sizes, positions, dtype, budget):
    wide, middle, high = sizes
    params = random_tree({"in": (wide, middle), "b": (middle,), "out": (high, middle)}, 2, torch.float64)
    batch = {"x": random_tree((4, *positions, wide), 3, torch.float64)}

    def loss(params, batch):
        return F.linear((batch["x"] @ params["in"] + params["b"]).sin(), params["out"])

    params, batch = ft.tree.map(lambda leaf: leaf.to(dtype), (params, batch))
    exact = by_hand(loss, *ft.tree.map(torch.Tensor.double, (params, batch)))[0]
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    taken = example_grads(ft.grad(loss), params, batch, budget=budget).grads
    assert {leaf.dtype for leaf in ft.tree.leaves(taken)} == {dtype}
    for path, whole in ft.tree.named(exact).items():
        assert (ft.tree.named(taken)[path].double() - whole).norm() <= tolerance * (whole.norm() + 1), path


# --- errors, and what surrounds a call ------------------------------------------------------------------------------


class TheirError(Exception):
    pass


@pytest.mark.parametrize("error", [TheirError("theirs"), KeyError("z"), RuntimeError("theirs"), TypeError("theirs")])
def test_an_error_of_the_loss_is_raised_as_it_is(error):
    def their_layer(x):
        raise error

    with pytest.raises(type(error)) as raised:
        example_grads(ft.grad(lambda p, b: their_layer(b @ p)), torch.ones(2, 2), torch.ones(3, 2))
    assert raised.value is error
    assert raised.value.__context__ is None
    assert "their_layer" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def test_an_error_that_only_some_examples_have():
    def loss(params, x):
        if x.sum() > 2:
            raise TheirError("this one")
        return x @ params

    with pytest.raises(TheirError, match="this one"):
        example_grads(ft.grad(loss), torch.ones(1, 1), torch.arange(5.0).unsqueeze(1))


def test_shapes_that_do_not_fit_are_told_as_torch_tells_them():
    with pytest.raises(RuntimeError, match=r"1x3 and 2x3"):
        example_grads(ft.grad(lambda p, b: b @ p[:2]), torch.ones(3, 3), torch.ones(4, 3))


def test_a_loss_outside_its_contract():
    params, batch = {"a": torch.ones(3, 3)}, torch.ones(4, 3)
    with pytest.raises(LossError, match="0-d"):
        example_grads(ft.grad(lambda p, b: (b @ p["a"]).mean()), params, batch)
    with pytest.raises(LossError, match="declares `key`"):
        example_grads(ft.grad(lambda p, b, *, key: b @ p["a"]), params, batch)
    with pytest.raises(LossError, match="no example has a gradient of its"):
        example_grads(ft.grad(lambda p, b, *, carry: (b @ p["a"], carry)), params, batch, carry=torch.ones(3))
    with pytest.raises(TreeError, match="floating"):
        example_grads(ft.grad(lambda p, b: b * p), torch.tensor(1), batch)
    with pytest.raises(TreeError, match="tensors"):
        example_grads(ft.grad(lambda p, b: b * p), torch.tensor(1.0), np.ones(3))
    with pytest.raises(TreeError, match="empty"):
        example_grads(ft.grad(lambda p, b: b * p), torch.tensor(1.0), torch.ones(0))


def test_params_changed_in_place_are_an_error_and_stay_as_they_were():
    params, batch = {"a": torch.ones(3, 3)}, torch.ones(4, 3)

    def loss(params, x):
        params["a"].mul_(2)
        return x @ params["a"]

    with pytest.raises(LossError, match="in place"):
        example_grads(ft.grad(loss), params, batch)
    assert torch.equal(params["a"], torch.ones(3, 3))

    def sly(params, x):
        with torch.no_grad():
            params["a"].mul_(2)
        return x @ params["a"]

    with pytest.raises(LossError, match="in place"):
        example_grads(ft.grad(sly), params, batch)


@pytest.mark.parametrize("write", [lambda x, h: x.add_(h), lambda x, h: x.copy_(h)])
def test_a_layers_input_written_to_is_an_error_and_never_a_wrong_number(write):
    def loss(params, batch):
        x = batch.clone()
        hidden = x @ params
        write(x, hidden)
        return (x @ params).square()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        example_grads(ft.grad(loss), torch.ones(3, 3), torch.ones(4, 3))


def written_view(images):
    images.view(len(images), -1).mul_(2)
    return images


def written_base(images):
    flat = images.flatten(1)
    images.relu_()
    return flat


def written_copy(images):
    images.permute(0, 2, 3, 1).reshape(len(images), -1).mul_(2)
    return images


def written_alias(images):
    images.contiguous().mul_(2)
    return images


def written_flat(images):
    return images.flatten(1).relu_()


@pytest.mark.parametrize(
    "read",
    [
        written_view,
        written_base,
        written_copy,
        written_alias,
        written_flat,
        lambda images: images.as_strided((len(images), 9), (36, 1)),
        lambda images: images.relu().view(len(images), -1) + images.permute(0, 2, 3, 1).reshape(-1, 36),
        lambda images: F.max_pool2d(images.relu_(), 2).flatten(1),
        lambda images: F.max_pool2d(images, 2, return_indices=True)[0].view_as(torch.empty(len(images), 4)),
    ],
)
def test_images_are_to_a_loss_as_they_lie_in_memory_when_it_runs_by_itself(read):
    # In float32, layers give images with channels last, of which a view may be a copy and a copy a view.
    params, x = random_tree({"k": (4, 2, 2, 2), "w": (4, 3)}, 0), random_tree((3, 2, 4, 4), 1)

    def loss(params, x):
        features = read(F.conv2d(x, params["k"])).reshape(len(x), -1)[:, :4]
        return (features @ params["w"]).square()

    close(example_grads(ft.grad(loss), params, x).grads, by_hand(loss, params, x)[0], 1e-5)
    assert plan_of(ft.grad(loss), params, x)["k"].startswith("convolution")


def test_nothing_that_was_given_is_changed():
    params, batch = net_params(), net_batch(4)
    before = ft.tree.map(torch.clone, (params, batch))
    example_grads(ft.grad(net_loss), params, batch)
    assert all(torch.equal(a, b) for a, b in zip(ft.tree.leaves(before), ft.tree.leaves((params, batch))))
    assert not any(leaf.requires_grad for leaf in ft.tree.leaves((params, batch)))
    assert torch.is_grad_enabled()


def test_under_vmap_over_params_and_through_a_second_derivative():
    batch = net_batch(3, dtype=torch.float64)
    grad = ft.grad(lambda p, b: torch.tanh(b["x"] @ p))
    stacked = random_tree((2, 3, 4), 4, torch.float64)
    together = torch.func.vmap(lambda p: example_grads(grad, p, batch).grads)(stacked)
    close(together, torch.stack([example_grads(grad, p, batch).grads for p in stacked]))

    def roughness(params):
        return example_grads(grad, params, batch).grads.square().sum()

    params = stacked[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(roughness(params), params)
    close(torch.func.grad(roughness)(stacked[0]), slope)
    step = 1e-6 * torch.ones_like(stacked[0])
    difference = (roughness(stacked[0] + step) - roughness(stacked[0] - step)) / 2
    assert abs(float((slope * step).sum() - difference)) < 1e-9


def test_ambient_no_grad_and_autocast_do_not_reach_the_algebra():
    params, batch = net_params(), net_batch(4)
    expected = example_grads(ft.grad(net_loss), params, batch).grads
    with torch.no_grad():
        close(example_grads(ft.grad(net_loss), params, batch).grads, expected, 0)
    with torch.autocast("cpu", torch.bfloat16):
        shortened = example_grads(ft.grad(net_loss), params, batch).grads
    close(shortened, expected, 0.05)


def test_autocast_inside_the_loss_gives_gradients_of_the_params_own_dtype():
    params, loss = convolutional()

    def short(params, batch, *, key):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(params, batch, key=key).float()

    key, batch = ft.random.key(0), images(6)
    taken = example_grads(ft.grad(short), params, batch, key=key).grads
    assert {leaf.dtype for leaf in ft.tree.leaves(taken)} == {torch.float32}
    close(taken, example_grads(ft.grad(loss), params, batch, key=key).grads, 0.1)
