"""remat: the same derivatives of every order under every transform, less memory, and no gradient lost without a word."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from allocated import peak
from hypothesis import given
from hypothesis import strategies as st
from instances import PLANS, images, net_batch, net_params, random_tree, recurrent
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.testing import equal, same_bits

func = torch.func


def normal(*shape, seed=0, dtype=torch.float64):
    return ft.random.normal(ft.random.key(seed), shape, dtype)


def layer(w, x):
    return torch.tanh(x @ w["in"]).sin() @ w["out"]


def value(block, w, x):
    """A number out of two blocks, and not a linear one: its derivatives of all orders differ."""
    return block(w, block(w, x)).square().sum().exp()


def summed(derivative):
    return lambda *args: sum(leaf.square().sum() for leaf in ft.tree.leaves(derivative(*args)))


def by_autograd(block, w, x, order=1):
    w = ft.tree.map(lambda leaf: leaf.clone().requires_grad_(), w)
    total, leaves = value(block, w, x), ft.tree.leaves(w)
    for _ in range(order - 1):
        total = sum(leaf.square().sum() for leaf in torch.autograd.grad(total, leaves, create_graph=True))
    total.backward()
    return ft.tree.map(lambda leaf: leaf.grad, w)


def mapped_over(w):
    return ft.tree.map(lambda leaf: torch.stack([leaf, 0.5 * leaf]), w)


DERIVATIVES = {
    "autograd": by_autograd,
    "autograd, twice": functools.partial(by_autograd, order=2),
    "autograd, thrice": functools.partial(by_autograd, order=3),
    "grad": lambda f, w, x: func.grad(value, 1)(f, w, x),
    "grad of grad": lambda f, w, x: func.grad(summed(lambda w: func.grad(value, 1)(f, w, x)))(w),
    "grad of grad of grad": lambda f, w, x: func.grad(summed(func.grad(summed(lambda w: func.grad(value, 1)(f, w, x)))))(w),
    "grad of grad, mixed": lambda f, w, x: func.grad(summed(lambda x: func.grad(value, 1)(f, w, x)))(x),
    "vjp": lambda f, w, x: func.vjp(lambda w, x: f(w, x), w, x)[1](torch.ones_like(x)),
    "jvp": lambda f, w, x: func.jvp(lambda x: value(f, w, x), (x,), (x.cos(),)),
    "vmap over params": lambda f, w, x: func.vmap(lambda w: value(f, w, x))(mapped_over(w)),
    "vmap of grad over params": lambda f, w, x: func.vmap(lambda w: func.grad(value, 1)(f, w, x))(mapped_over(w)),
    "vmap of grad over examples": lambda f, w, x: func.vmap(lambda row: func.grad(value, 1)(f, w, row))(x),
    "grad of vmap": lambda f, w, x: func.grad(lambda w: func.vmap(lambda row: value(f, w, row))(x).sum())(w),
    "vmap of vmap of grad": lambda f, w, x: func.vmap(lambda w: func.vmap(lambda row: func.grad(value, 1)(f, w, row))(x))(
        mapped_over(w)
    ),
    "grad of vmap of grad": lambda f, w, x: func.grad(
        summed(lambda w: func.vmap(lambda row: func.grad(value, 1)(f, w, row))(x))
    )(w),
    "hessian": lambda f, w, x: func.hessian(lambda x: value(f, w, x))(x),
    "jacrev of jacfwd": lambda f, w, x: func.jacrev(func.jacfwd(lambda x: value(f, w, x)))(x),
    "autograd of grad": lambda f, w, x: by_autograd(lambda w, x: func.grad(lambda x: f(w, x).square().sum())(x), w, x),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_is_that_of_the_function(name):
    w, x = {"in": normal(3, 4) / 2, "out": normal(4, 3, seed=1) / 2}, normal(2, 3, seed=2) / 2
    taken = [DERIVATIVES[name](block, w, x) for block in (layer, ft.remat(layer))]
    equal(name, taken[1], taken[0])
    assert all(bool(leaf.any()) for leaf in ft.tree.leaves(taken[1]))


DIGITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from(list(DIGITS)), st.integers(0, 99))
def test_the_gradient_is_the_formulas(size, width, dtype, seed):
    w, x = normal(3, width, seed=seed, dtype=dtype), normal(size, 3, seed=seed + 1, dtype=dtype)
    block = ft.remat(lambda w, x: torch.tanh(x @ w))
    grads = ft.grad(lambda w, x: block(w, x).square().sum(1))(w, x).grads
    exact_w, exact_x = w.double().numpy(), x.double().numpy()
    y = np.tanh(exact_x @ exact_w)
    np.testing.assert_allclose(
        grads.double().numpy(), exact_x.T @ (2 * y * (1 - y**2)), rtol=DIGITS[dtype], atol=10 * DIGITS[dtype]
    )
    assert grads.dtype == dtype


def test_derivatives_agree_with_finite_differences():
    block = ft.remat(lambda w, x, *, scale: (torch.tanh(x @ w) * scale, {"mean": x.mean(), "rows": len(x)}))

    def numbers(w, x, scale):
        y, facts = block(w, x, scale=scale)
        return y, facts["mean"] * facts["rows"]

    inputs = tuple(leaf.requires_grad_() for leaf in (normal(3, 2), normal(4, 3, seed=1), normal(seed=2)))
    assert torch.autograd.gradcheck(numbers, inputs)
    assert torch.autograd.gradgradcheck(numbers, inputs)


def test_complex_numbers():
    w, x = torch.complex(normal(3, 2), normal(3, 2, seed=1)), torch.complex(normal(4, 3, seed=2), normal(4, 3, seed=3))
    function = ft.remat(lambda w, x: (x @ w).sin())
    assert torch.autograd.gradcheck(function, (w.requires_grad_(), x))


# --- what goes in and out ------------------------------------------------------------------------------------------


def test_trees_keywords_integers_and_what_is_no_tensor():
    seen = []

    @ft.remat
    def block(params, batch, power, *, labels, key, name="none", nothing=None):
        seen.append((power, name, nothing))
        x = ft.random.dropout(batch["x"], 0.5, key) @ params["layers"][0]
        hits = x.argmax(1) == labels
        return ft.Losses(x**power, None, {"hits": hits}), [name, nothing, hits.sum(), power]

    params, batch = {"layers": (normal(3, 3),)}, {"x": normal(4, 3, seed=1)}
    labels, key = torch.tensor([0, 1, 2, 0]), ft.random.example_keys(ft.random.key(5), 4)

    def loss(params, batch):
        losses, (name, nothing, count, power) = block(params, batch, 3, labels=labels, key=key, name="third")
        assert (name, nothing, power) == ("third", None, 3)
        assert losses.aux["hits"].dtype == torch.bool
        assert count.dtype == torch.int64
        return losses.losses.sum(1)

    kept = ft.random.dropout(batch["x"], 0.5, key).numpy()
    formula = kept.T @ (3 * (kept @ params["layers"][0].numpy()) ** 2)
    for take in (ft.grad(loss), lambda p, b: ft.Gradient(func.grad(lambda p: loss(p, b).sum())(p), None, None)):
        np.testing.assert_allclose(take(params, batch).grads["layers"][0].numpy(), formula, rtol=1e-12)
    # Once forward and once backward each.
    assert seen == [(3, "third", None)] * 4


def test_what_is_handed_through_is_handed_through():
    x, labels = normal(3), torch.arange(3)
    y, same, given_labels = ft.remat(lambda x, labels: (x.sin(), x, labels))(x.requires_grad_(), labels)
    assert same is x
    assert given_labels is labels
    (y.sum() + same.sum()).backward()
    same_bits("gradient", x.grad, x.detach().cos() + 1)


def test_arguments_that_are_used_twice_or_not_at_all():
    x = normal(3).requires_grad_()
    unused = normal(2).requires_grad_()
    first, second = ft.remat(lambda a, b, unused: (a * b, unused.detach().sum()))(x, x, unused)
    (first.sum() + second).backward()
    same_bits("both", x.grad, 2 * x.detach())
    same_bits("neither", unused.grad, torch.zeros(2, dtype=torch.float64))


def test_a_result_that_nobody_uses_has_no_derivative():
    """√x has none at 0: a gradient of zero for it would be 0 · ∞."""
    block = ft.remat(lambda x: (x.square() + x, x.sqrt()))

    def first(x):
        return block(x)[0].sum()

    zeros = torch.zeros(2, 3)
    for gradient in (func.grad(first), func.vmap(func.grad(first))):
        assert torch.equal(gradient(zeros), torch.ones(2, 3))
    tracked = zeros.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(first(tracked), tracked)[0], torch.ones(2, 3))
    assert torch.equal(func.grad(lambda x: func.grad(first)(x).sum())(zeros), torch.full((2, 3), 2.0))


def test_a_whole_loss_keeps_its_signature():
    def loss(params, batch, *, carry, key):
        return (ft.random.dropout(batch, 0.5, key) * params).square().sum(1), carry + 1

    whole = ft.remat(loss)
    assert inspect.signature(whole) == inspect.signature(loss)
    assert ft.explain(whole).title == ft.explain(loss).title
    params, batch, given = normal(3), normal(4, 3), {"carry": torch.tensor(0), "key": ft.random.key(0)}
    same_bits("gradient", ft.grad(whole)(params, batch, **given), ft.grad(loss)(params, batch, **given))


@pytest.mark.parametrize("how", PLANS)
def test_every_plan_with_a_module_that_draws(how):
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(36, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 36)))
    sums = []
    for change in (lambda block: block, ft.remat):
        block = change(lambda params, x, key: apply(params, x, key=key))

        def loss(params, batch, *, key, block=block):
            hidden = block(params, batch["x"].flatten(1), key)
            return F.cross_entropy(block(params, hidden, ft.random.fold_in(key, 1)), batch["y"], reduction="none")

        sums.append(ft.parallel(ft.grad(loss), 3, how=how, workers=2)(params, images(7), key=ft.random.key(4)))
    same_bits(how, sums[1], sums[0])


def test_batch_norm_gives_its_buffers_back():
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()))
    sums = []
    for change in (lambda block: block, ft.remat):
        block = change(lambda params, x, carry: apply(params, x, carry=carry))

        def loss(params, batch, *, carry, block=block):
            y, carry = block(params, batch["x"], carry)
            return y.square().sum(1), carry

        sums.append(ft.grad(loss)(params, net_batch(6), carry=apply.buffers))
    same_bits("gradient and buffers", sums[1], sums[0])


def test_recurrence_across_blocks():
    params, loss, start = recurrent()
    batch = {"x": random_tree((4, 6, 3), 0), "y": random_tree((4, 6, 2), 1)}
    grads = [ft.grad(function)(params, batch, carry=start(batch)) for function in (loss, ft.remat(loss))]
    equal("LSTM", grads[1], grads[0])


def test_members_of_a_population():
    params, batch, block = net_params(0, torch.float64), net_batch(5, 0, torch.float64), ft.remat(net_value)
    runs = []
    for function in (net_value, block):
        single = ft.step(ft.grad(function), ft.optim.adamw(0.1))
        step = ft.population(single)
        state = step.init([single.init(params), single.init(ft.tree.map(lambda leaf: 2 * leaf, params))])
        for _ in range(2):
            state, _ = step.update(state, batch)
        runs.append(state.params)
    equal("population", runs[1], runs[0])


def net_value(params, batch):
    hidden = torch.tanh(batch["x"] @ params["hidden"]["w"] + params["hidden"]["b"])
    return (hidden @ params["out"][0] + params["out"][1]).mul(params["scale"]).square().sum(1)


def test_remat_within_remat():
    calls = []

    @ft.remat
    def inner(w, x):
        calls.append("inner")
        return torch.tanh(x @ w)

    outer = ft.remat(lambda w, x: inner(w, inner(w, x)))
    w, x = normal(3, 3), normal(2, 3, seed=1)
    twice = [
        func.grad(lambda w, f=f: func.grad(lambda w: f(w, x).square().sum())(w).square().sum())(w)
        for f in (outer, lambda w, x: torch.tanh(torch.tanh(x @ w) @ w))
    ]
    equal("second derivative", *twice)
    calls.clear()
    ft.grad(lambda w, x: outer(w, x).square().sum(1))(w, x)
    # Forward, again for the outer backward pass, and again for each inner one.
    assert len(calls) == 6


def test_the_precision_of_the_forward_pass_is_that_of_the_second():
    w, x = normal(8, 8, dtype=torch.float32), normal(4, 8, seed=1, dtype=torch.float32)
    dtypes, grads = [], []

    def block(w, x):
        y = x @ w
        dtypes.append(y.dtype)
        return torch.tanh(y)

    for function in (block, ft.remat(block)):
        tracked = w.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(tracked, x)
        y.float().square().sum().backward()
        grads.append(tracked.grad)
    assert dtypes == [torch.bfloat16] * 3
    same_bits("gradient", grads[1], grads[0])


def test_where_no_gradient_is_taken_it_is_the_function():
    calls = []
    w = normal(3).requires_grad_()
    block = ft.remat(lambda x: calls.append(0) or x * w)
    with torch.no_grad():
        assert not block(w).requires_grad
    assert len(calls) == 1
    constant = w.detach()
    same_bits("constants may be closed over", ft.remat(lambda x: x * constant)(w), w * w)
    mask = normal(4, 3) > 0
    block = ft.remat(lambda w, x: torch.where(mask, x * w, 0.0).square().sum(1))
    equal("in a loss", ft.grad(block)(constant, normal(4, 3)).grads, 2 * constant * (mask * normal(4, 3) ** 2).sum(0))


# --- compiled ------------------------------------------------------------------------------------------------------


def test_traced_it_computes_twice_and_the_same():
    w, x = normal(3, 3), normal(2, 3, seed=1)
    block = ft.remat(lambda w, x: torch.tanh(x @ w))
    take = func.grad(lambda w, x: block(w, block(w, x)).square().sum())
    graph = make_fx(take, tracing_mode="fake")(w, x)
    same_bits("gradient", graph(w, x), take(w, x))
    assert sum(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes) == 4
    # What the second pass waits for changes nothing, not even beside numbers that are none.
    same_bits("not a number", graph(w, x * float("nan")), take(w, x * float("nan")))
    same_bits("infinite", graph(w * float("inf"), x), take(w * float("inf"), x))
    assert torch.signbit(graph(-0.0 * w, x)).equal(torch.signbit(take(-0.0 * w, x)))


def test_vmapped_and_traced_params_stay_unmapped():
    w, x = normal(3, 3), normal(4, 2, 3, seed=1)
    block = ft.remat(lambda w, x: torch.tanh(x @ w))
    take = func.vmap(func.grad(lambda x, w: block(w, x).square().sum()), (0, None))
    graph = make_fx(take, tracing_mode="fake")(x, w)
    same_bits("gradient", graph(x, w), take(x, w))
    shapes = [node.meta["val"].shape for node in graph.graph.nodes if node.target is torch.ops.aten.where.self]
    assert sorted(shapes) == [(3, 3), (4, 2, 3)]


# --- memory --------------------------------------------------------------------------------------------------------

WIDTH, ROWS = 16, 256


def deep(change, depth, layers):
    """A chain of blocks of layers: kept are the values of all layers, or those of each block and of one block's layers."""

    def block(w, x):
        for _ in range(layers):
            x = torch.tanh(x @ w)
        return x

    block = change(block)

    def loss(params, x):
        for w in params:
            x = block(w, x)
        return x.square().sum(1)

    return ft.grad(loss), [normal(WIDTH, WIDTH, seed=place, dtype=torch.float32) / 4 for place in range(depth)]


TAKEN = {
    "autograd": lambda grad, params, x: grad(params, x),
    "func.grad": lambda grad, params, x: func.grad(lambda params: grad.loss(params, x).sum())(params),
    "vmap": lambda grad, params, x: ft.parallel(grad, 2, how="vmap")(params, x),
    "grad of vmap": lambda grad, params, x: func.grad(
        lambda params: func.vmap(lambda rows: grad.loss(params, rows).sum())(x.view(4, -1, WIDTH)).sum()
    )(params),
}


@pytest.mark.parametrize("name", TAKEN)
def test_only_the_blocks_inputs_are_kept(name):
    depth, layers = 8, 6
    x, peaks = normal(ROWS, WIDTH, dtype=torch.float32), []
    for change in (lambda block: block, ft.remat):
        grad, params = deep(change, depth, layers)
        peaks.append(peak(lambda grad=grad, params=params: TAKEN[name](grad, params, x)) / x.nbytes)
    plain, less = peaks
    assert plain > depth * layers
    # Twice the blocks' inputs (torch.func keeps their gradients, too), and a block forward and backward.
    assert less < 2 * depth + 3 * layers + 4
    assert less < 0.6 * plain


def test_a_compiled_step_keeps_only_the_blocks_inputs():
    depth, layers = 4, 4
    x = normal(ROWS, WIDTH, dtype=torch.float32)
    (plain, params), (grad, _) = deep(lambda block: block, depth, layers), deep(ft.remat, depth, layers)
    step = ft.compiled(ft.step(grad, ft.optim.sgd(1e-3)), donate=False)
    state = step.init(params)
    new, _ = step.update(state, x)
    equal("params", new.params, [w - 1e-3 * g for w, g in zip(params, plain.finished(params, x).grads)])
    # Without rematerialisation 17, and 20 where the compiler may compute both forward passes side by side.
    assert peak(lambda: step.update(state, x)) / x.nbytes < 0.6 * depth * layers


# --- what would lose a gradient --------------------------------------------------------------------------------------


class Scaled:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x * self.w

    def method(self, x):
        return x * self.w


class Hidden:
    w = None


def by_global(w):
    Hidden.w = w
    return lambda x: x * Hidden.w


# How a function gets hold of a tensor, and the name that the message has for it.
CAPTURES = {
    "closure": (lambda w: lambda x: x * w, "'w'"),
    "closure over a tree": (lambda w: (lambda params: lambda x: x * params["a"][0])({"a": [w]}), "'params'"),
    "closure of a closure": (lambda w: (lambda inner: lambda x: inner(x))(lambda x: x * w), "'w'"),
    "default": (lambda w: lambda x, w=w: x * w, "gradients are taken of"),
    "keyword default": (lambda w: lambda x, *, w=w: x * w, "gradients are taken of"),
    "partial": (lambda w: functools.partial(torch.mul, w), "gradients are taken of"),
    "partial keyword": (lambda w: functools.partial(torch.mul, other=w), "'other'"),
    "bound method": (lambda w: Scaled(w).method, "'w'"),
    "callable object": (lambda w: Scaled(w), "'w'"),
    "global": (by_global, "gradients are taken of"),
}
UNDER = {
    "ft.grad": lambda make: ft.grad(lambda w, x: ft.remat(make(w))(x))(normal(3), normal(3, seed=1)),
    "ft.grad, arguments too": lambda make: ft.grad(lambda w, x: ft.remat(make(w))(x * w))(normal(3), normal(3, seed=1)),
    "autograd": lambda make: ft.remat(make(normal(3).requires_grad_()))(normal(3)),
    "func.grad": lambda make: func.grad(lambda w: ft.remat(make(w))(normal(3)).sum())(normal(3)),
    "inner of two": lambda make: func.grad(lambda w: func.grad(lambda x: ft.remat(make(w))(x).sum())(w).sum())(normal(3)),
    "outer of two": lambda make: func.grad(
        lambda w: func.grad(lambda x: ft.remat(make(w * 1))(x).sum())(normal(3)).square().sum()
    )(normal(3)),
    "vmap of grad": lambda make: func.vmap(func.grad(lambda w: ft.remat(make(w))(normal(3)).sum()))(normal(2, 3)),
    "grad of vmap": lambda make: func.grad(lambda w: func.vmap(lambda x: ft.remat(make(w))(x))(normal(2, 3)).sum())(normal(3)),
    "jvp": lambda make: func.jvp(lambda w: ft.remat(make(w))(normal(3)), (normal(3),), (normal(3),)),
    "traced": lambda make: make_fx(func.grad(lambda w: ft.remat(make(w))(torch.ones(3)).sum()), tracing_mode="fake")(
        torch.ones(3)
    ),
}


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_tensor_that_is_no_argument_is_an_error_and_no_silent_zero(capture, under):
    make, message = CAPTURES[capture]
    with pytest.raises(ft.LossError, match=r"depends on a tensor.*pass it as an argument") as raised:
        UNDER[under](make)
    assert message in str(raised.value)


def test_a_module_is_no_function_of_its_parameters():
    with pytest.raises(ft.LossError, match=r"Linear given to remat depends on a tensor.*pass it as an argument"):
        ft.remat(nn.Linear(3, 2))(torch.ones(4, 3))


def test_an_argument_of_the_function_around_it_is_no_argument():
    outer = ft.remat(lambda w, x: ft.remat(lambda x: x * w)(x))
    with pytest.raises(ft.LossError, match=r"gradients are taken of \('w'\)"):
        ft.grad(outer)(normal(3), normal(4, 3))


def test_a_mapped_tensor_that_is_no_argument():
    def example(w, x, key):
        block = ft.remat(lambda w, x: (ft.random.dropout(x, 0.5, key) * w).sum())
        return func.grad(block)(w, x)

    keys = ft.random.split(ft.random.key(0), 4)
    with pytest.raises(ft.LossError, match=r"closes over a tensor that vmap maps over \('key'\)"):
        func.vmap(example, (None, 0, 0))(normal(3), normal(4, 3), keys)
    # Nothing is computed again where no gradient is taken.
    func.vmap(lambda w, x: ft.remat(lambda w: w * x)(w), (None, 0))(normal(3), normal(4, 3))


def in_place(w, x):
    return x.mul_(2) * w


IMPURE = {
    "in place": (in_place, r"changes one of its arguments in place.*work on a copy"),
    "dropout": (lambda w, x: F.dropout(x * w), r"global generator \(aten\.\w+"),
    "noise": (lambda w, x: x * w + torch.randn(3), r"global generator \(aten\.randn"),
    "attention": (
        lambda w, x: F.scaled_dot_product_attention(*[(x * w).expand(1, 2, 3)] * 3, dropout_p=0.5).sum((0, 1)),
        "take them from ft.random with a key",
    ),
}


TAKE = {
    "ft.grad": lambda loss: ft.grad(loss)(torch.ones(3), torch.ones(3)),
    "func.grad": lambda loss: func.grad(lambda w: loss(w, torch.ones(3)).sum())(torch.ones(3)),
    "traced": lambda loss: make_fx(func.grad(lambda w: loss(w, torch.ones(3)).sum()), tracing_mode="fake")(torch.ones(3)),
}


@pytest.mark.parametrize("under", TAKE)
@pytest.mark.parametrize("name", IMPURE)
def test_what_would_not_be_the_same_again(name, under):
    function, message = IMPURE[name]
    with pytest.raises(ft.LossError, match=message):
        TAKE[under](lambda w, x: ft.remat(function)(w, x * 1))


def test_what_draws_is_found_out_in_the_first_call_and_whenever_it_is_traced():
    block = ft.remat(lambda w, x, p: F.dropout(x * w, p))
    w, x = torch.ones(3), torch.ones(3)
    with pytest.raises(ft.LossError, match="global generator"):
        block(w, x, 0.5)
    block = ft.remat(lambda w, x, p: F.dropout(x * w, p, training=p > 0))
    block(w, x, 0.0)
    with pytest.raises(ft.LossError, match="global generator"):
        make_fx(lambda w, x: block(w, x, 0.5), tracing_mode="fake")(w, x)


def test_operators_that_could_draw_and_do_not():
    def block(w, x):
        y = F.scaled_dot_product_attention(*[(x * w).expand(1, 2, 4, 3)] * 3)
        return F.dropout(y, training=False).square().sum((0, 1, 3))

    w, x = normal(3), normal(4, 3)
    equal("attention", ft.grad(ft.remat(block))(w, x), ft.grad(block)(w, x))


def test_what_cannot_be_called():
    with pytest.raises(ft.ArgumentError, match=r"remat takes a function, got Tensor: write ft\.remat\(lambda params, x"):
        ft.remat(torch.ones(3))


def test_an_error_in_the_function_is_its_own():
    with pytest.raises(ZeroDivisionError):
        ft.remat(lambda x: x / (1 // 0))(torch.ones(3))
