"""Clipped and private gradients, held against Opacus, NumPy, and the normal distribution."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import PLANS, images, keyed_loss, net_batch, net_loss, net_params
from torch import nn

import functrain as ft
from functrain.core import reduce
from functrain.testing import check_grad, equal, same_bits

KEY = ft.random.key(7)


def perceptron():
    torch.manual_seed(0)
    layers = [layer for sizes in pairwise((12, 24, 16, 5)) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional():
    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1))
    return nn.Sequential(front, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5))


def problem(kind, size=24):
    """A module in float64, its loss, and a batch whose examples' gradients differ in length a hundredfold."""
    module = (perceptron() if kind == "MLP" else convolutional()).double()
    shape = (size, 12) if kind == "MLP" else (size, 1, 8, 8)
    x = ft.random.normal(ft.random.key(1), shape, torch.float64)
    x = x * torch.logspace(0, 2, size, dtype=torch.float64).reshape(-1, *(1,) * (x.ndim - 1))
    batch = {"x": x, "y": torch.arange(size) % 5}
    params, apply = ft.functional(module)

    def loss(params, batch):
        return 10 * F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")

    return module, params, loss, batch


def opacus_step(module, batch, norm, rate, size):
    """The clipped sum and the params after one step of Opacus's DP-SGD without noise, by name."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    names = [name for name, _ in module.named_parameters()]
    wrapped = GradSampleModule(module)
    inner = torch.optim.SGD(wrapped.parameters(), lr=rate)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=norm, expected_batch_size=size)
    (10 * F.cross_entropy(wrapped(batch["x"]), batch["y"])).backward()
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in wrapped.parameters()]).norm(dim=0)
    optimizer.step()
    summed = dict(zip(names, [p.summed_grad.detach() for p in wrapped.parameters()]))
    after = dict(zip(names, [p.detach().clone() for p in wrapped.parameters()]))
    return norms, summed, after


# Torch says so of every module with backward hooks whose inputs need no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["MLP", "CNN"])
def test_the_clipped_sum_and_the_step_are_those_of_opacus(kind):
    module, params, loss, batch = problem(kind)
    size, rate = 24, 0.1
    norms, _, _ = opacus_step(problem(kind)[0], batch, 1.0, rate, size)
    # Half of the examples are clipped. Opacus divides by ‖g‖ + 1e-6, which is within 1e-6 of ‖g‖ where that is above 1.
    norm = float(norms.median()) * 1.01
    assert norm > 1
    _, summed, after = opacus_step(module, batch, norm, rate, size)
    private = ft.parallel(ft.grad(loss), 1, reduce.private(norm, 0.0, size=size))
    step = ft.step(private, ft.optim.sgd(rate))
    state, _ = step(step.init(params), batch)
    mean = private.finished(params, batch, key=KEY).grads
    clipped = ft.parallel(ft.grad(loss), 1, reduce.clip_per_example(norm)).finished(params, batch).grads
    for name, expected in summed.items():
        for got in (mean[name], clipped[name]):
            assert (got * size - expected).norm() < 1e-6 * expected.norm(), name
        assert (state.params[name] - after[name]).norm() < 1e-6 * after[name].norm(), name


def by_numpy(params, batch, norm, keys=None):
    """Σᵢ min(1, C/‖gᵢ‖) gᵢ over gradients taken one example at a time, as float64 arrays."""
    total, lengths = None, []
    loss = net_loss if keys is None else keyed_loss
    for place, one in enumerate(ft.tree.divide(batch, len(batch["x"]))):
        key = None if keys is None else keys[place : place + 1]
        taken = ft.tree.leaves(ft.grad(loss)(params, one, key=key).grads)
        leaves = [leaf.double().numpy() for leaf in taken]
        length = math.sqrt(sum((leaf**2).sum() for leaf in leaves))
        factor = norm / length if length > norm else 1.0
        lengths.append(length)
        total = [factor * leaf + (0 if total is None else before) for leaf, before in zip(leaves, total or leaves)]
    return total, lengths


@settings(max_examples=12)
@given(
    size=st.integers(1, 9),
    parts=st.integers(1, 5),
    how=st.sampled_from(PLANS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    share=st.floats(0.0, 1.5),
    keyed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clipping_is_that_of_numpy_in_every_plan(size, parts, how, dtype, share, keyed, seed):
    params, batch = net_params(seed, dtype), net_batch(size, seed, dtype)
    keys = ft.random.split(ft.random.key(seed), size) if keyed else None
    # Between all clipped and none.
    _, lengths = by_numpy(params, batch, 1.0, keys)
    norm = min(lengths) * 0.5 + share * max(lengths) + 1e-3
    total, _ = by_numpy(params, batch, norm, keys)
    weight = batch["weight"].double().sum().item()
    grad = ft.grad(keyed_loss if keyed else net_loss)
    key = ft.random.key(seed)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for reducer, by in (
        (reduce.clip_per_example(norm), weight),
        (reduce.private(norm, 0.0), weight),
        (reduce.private(norm, 0.0, size=5), 5),
    ):
        done = ft.parallel(grad, parts, reducer, how=how, workers=2).finished(params, batch, key=key)
        for got, expected in zip(ft.tree.leaves(done.grads), total):
            assert got.dtype == dtype
            assert np.abs(got.double().numpy() - expected / by).max() <= tolerance * max(1.0, np.abs(expected / by).max())
        plain = grad.finished(params, batch, key=key)
        equal("loss, weight and aux are plain", done[1:], plain[1:])


def test_rows_of_weight_zero_contribute_nothing():
    params, batch = net_params(), net_batch(6)
    batch["weight"] = torch.ones(6)
    padded = ft.tree.concat([batch, net_batch(3, seed=5) | {"weight": torch.zeros(3)}])
    # However long their gradients would be.
    padded["x"][6:] *= 1e6
    for reducer in (reduce.clip_per_example(0.1), reduce.private(0.1, 1.0), reduce.private(0.1, 1.0, size=6)):
        for parts in (1, 4):
            taken = ft.parallel(ft.grad(net_loss), parts, reducer)
            got, expected = (taken.finished(params, rows, key=KEY) for rows in (padded, batch))
            equal(f"{reducer!r}, {parts} parts", got, expected)


def test_gradients_of_zero_stay_zero_and_none_grows():
    scale = reduce.clip_per_example(2.0).scale
    assert scale(torch.tensor([0.0, 1e-30, 1.0, 2.0, 8.0])).tolist() == [1.0, 1.0, 1.0, 1.0, 0.25]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        params = torch.zeros(3, dtype=dtype)
        batch = torch.tensor([[0.0, 0, 0], [3, 0, 4], [0.5, 0, 0]], dtype=dtype)
        grads = ft.parallel(ft.grad(lambda p, b: b @ p), 1, reduce.clip_per_example(1.0)).finished(params, batch).grads
        assert grads.dtype == dtype
        assert grads.double().numpy() == pytest.approx([1.1 / 3, 0, 0.8 / 3], rel=1e-2)


def test_the_gradient_of_one_example_is_never_longer_than_the_norm():
    params, batch = net_params(3), net_batch(40, 3)
    for one in ft.tree.divide(batch, 40):
        lifted = reduce.private(0.3, 1.0).lift(ft.grad(net_loss)(params, one))
        assert sum(leaf.double().square().sum() for leaf in ft.tree.leaves(lifted.grads)) ** 0.5 <= 0.3 * (1 + 1e-6)


def test_a_neighbouring_batch_moves_the_sum_by_the_norm_at_most():
    params, batch = net_params(), net_batch(12)
    summed = ft.parallel(ft.grad(net_loss), 1, reduce.private(0.5, 0.0, size=1))
    everyone = ft.tree.leaves(summed.finished(params, batch, key=KEY).grads)
    distances = []
    for place in range(12):
        weight = batch["weight"].clone()
        weight[place] = 0.0
        without = ft.tree.leaves(summed.finished(params, batch | {"weight": weight}, key=KEY).grads)
        distances.append(sum((a - b).double().square().sum() for a, b in zip(everyone, without)) ** 0.5)
    assert 0.49 < max(distances) <= 0.5 * (1 + 1e-5)


# --- noise -------------------------------------------------------------------------------------------------------


def nothing(shapes, dtype=torch.float32):
    """An unfinished gradient of no example, of leaves of these shapes."""
    grads = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return ft.Gradient(grads, torch.zeros(()), torch.zeros((), dtype=torch.float64))


def zeros_like(params):
    return ft.tree.map(torch.zeros_like, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_noise_is_normal_with_the_deviation_of_the_mechanism(dtype):
    count, norm, noise, size = 300_001, 0.8, 1.5, 16
    done = reduce.private(norm, noise, size=size).finished(nothing({"a": (count,), "b": (count,)}, dtype), KEY)
    a, b = (leaf.double() / (noise * norm / size) for leaf in (done.grads["a"], done.grads["b"]))
    for sample in (a, b):
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
            spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
            assert abs((sample**power).mean() - moment) < (5 * spread / math.sqrt(count) + 1e-2 * (dtype == torch.bfloat16))
    # Independent from leaf to leaf, and the two halves of Box and Muller's pairs from each other.
    half = (count + 1) // 2
    for left, right in ((a, b), (a[: count - half], a[half:]), (a[: count - half].square(), a[half:].square())):
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 5 / math.sqrt(half)
    assert done.grads["a"].dtype == dtype
    assert done.loss == 0
    assert done.weight == 0


def test_noise_is_added_to_the_sum_and_divided_by_the_size_or_the_weight():
    params, batch = net_params(), net_batch(8)

    def taken(noise, size):
        return ft.parallel(ft.grad(net_loss), 2, reduce.private(1.0, noise, size)).finished(params, batch, key=KEY).grads

    def added(noise, size, times):
        return ft.tree.map(lambda loud, quiet: (loud - quiet) * times, taken(noise, size), taken(0.0, size))

    unit = reduce.private(1.0, 1.0, size=1).finished(ft.grad(net_loss)(params, batch)._replace(grads=zeros_like(params)), KEY)
    equal("by the size", added(2.0, 4, times=4 / 2), unit.grads)
    equal("by the weight", added(2.0, None, times=batch["weight"].sum() / 2), unit.grads)


@pytest.mark.parametrize("how", PLANS)
def test_the_noise_is_the_same_in_every_plan(how):
    # Gradients of zero: what is left is noise, whose bits can be compared.
    def loss(params, batch):
        return (batch @ params["w"]) * 0.0

    params, batch = {"w": torch.ones(4), "b": torch.ones(3, 2)}, torch.ones(7, 4)
    reducer = reduce.private(1.0, 1.0, size=7)
    expected = reducer.finished(nothing({"w": (4,), "b": (3, 2)}), KEY)
    for parts, workers in ((1, 1), (3, 2), (7, 3)):
        got = ft.parallel(ft.grad(loss), parts, reducer, how=how, workers=workers).finished(params, batch, key=KEY)
        same_bits(f"{parts} parts", got.grads, expected.grads)


def test_noise_is_another_one_at_each_position_seed_and_leaf():
    step = ft.step(ft.parallel(ft.grad(lambda p, b: (b @ p["w"]) * 0.0), 1, reduce.private(1.0, 1.0)), ft.optim.sgd(1.0))
    seen = []
    for seed in (0, 1):
        state = step.init({"w": torch.zeros(3), "v": torch.zeros(3)}, seed=seed)
        for _ in range(3):
            new, _ = step(state, torch.ones(2, 3))
            seen += [tuple((new.params[name] - state.params[name]).tolist()) for name in ("w", "v")]
            state = new
    assert len(set(seen)) == len(seen) == 12


def test_randomness_of_the_loss_and_of_the_noise_are_apart():
    params, batch = net_params(), net_batch(5)
    grad = ft.parallel(ft.grad(keyed_loss), 2, reduce.private(1.0, 1.0))
    with pytest.raises(ft.LossError, match="declares `key`, and none was given"):
        grad.finished(params, batch)
    with pytest.raises(ft.LossError, match="draws random numbers and no key was given"):
        reduce.private(1.0, 1.0).finished(ft.grad(net_loss)(params, batch), None)
    # The clipped sum underneath has the loss's own dropout masks.
    quiet = ft.parallel(ft.grad(keyed_loss), 2, reduce.private(1.0, 0.0)).finished(params, batch, key=KEY)
    clipped = ft.parallel(ft.grad(keyed_loss), 3, reduce.clip_per_example(1.0)).finished(params, batch, key=KEY)
    equal("masks", quiet, clipped)


# --- in a run ----------------------------------------------------------------------------------------------------


def poisson_run(compiled):
    def loss(params, batch):
        rows, drawn = batch
        return (rows["x"] @ params["w"] - rows["y"]) ** 2, drawn

    x = ft.random.normal(ft.random.key(0), (30, 4))
    source = ft.arrays({"x": x, "y": x.sum(1)}).poisson(0.1, seed=2, pad=16)
    grad = ft.parallel(ft.grad(loss), 2, reduce.private(1.0, 0.5, size=3))
    step = ft.step(grad, ft.optim.sgd(0.1))
    step = ft.compiled(step) if compiled else step
    state = step.init({"w": torch.zeros(4)}, seed=1)
    for state, metrics in ft.fold(step, state, source, steps=4):
        pass
    return state, metrics


def test_a_compiled_private_run_is_the_same_run():
    equal("compiled", poisson_run(compiled=True), poisson_run(compiled=False))


def test_an_empty_batch_is_noise_alone():
    params, batch = net_params(), net_batch(4) | {"weight": torch.zeros(4)}
    done = ft.parallel(ft.grad(net_loss), 2, reduce.private(1.0, 1.0, size=4)).finished(params, batch, key=KEY)
    assert done.loss == done.weight == 0
    assert all(leaf.isfinite().all() and (leaf != 0).all() for leaf in ft.tree.leaves(done.grads))
    for reducer in (reduce.private(1.0, 1.0), reduce.clip_per_example(1.0)):
        with pytest.raises(ft.LossError, match="sum to zero"):
            ft.parallel(ft.grad(net_loss), 2, reducer).finished(params, batch, key=KEY)


def test_a_gradient_that_is_not_finite_is_seen_and_the_guard_skips_it():
    params, batch = net_params(), net_batch(4)
    batch["x"][2, 0] = torch.nan
    step = ft.guard(ft.step(ft.parallel(ft.grad(net_loss), 2, reduce.private(1.0, 1.0, size=4)), ft.optim.sgd(0.1)))
    state = step.init(params)
    new, metrics = step(state, batch)
    assert metrics["skipped"] == 1
    same_bits("params stay", new.params, state.params)
    assert new.position == 1


def test_it_nests_and_is_vmapped_as_a_population():
    grad = ft.parallel(ft.grad(net_loss), 2, reduce.private(1.0, 1.0))
    step = ft.step(grad, ft.optim.sgd(0.1))
    one = [step.init(net_params(seed), seed=seed) for seed in (0, 1, 2)]
    population = ft.population(step)
    states, _ = population(ft.tree.stack(one), net_batch(5))
    for state, member in zip(one, ft.tree.unstack(states)):
        equal("member", member.params, step(state, net_batch(5))[0].params)
    check_grad(ft.grad(net_loss), net_params(), net_batch(4))


def test_examples_that_share_buffers_are_refused():
    params, apply = ft.functional(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3)))

    def loss(params, batch, *, carry):
        scores, carry = apply(params, batch["x"], carry=carry)
        return F.cross_entropy(scores, batch["y"], reduction="none"), carry

    for reducer in (reduce.clip_per_example(1.0), reduce.private(1.0, 1.0)):
        with pytest.raises(ft.LossError, match=r"batch norm.*GroupNorm"):
            ft.parallel(ft.grad(loss), 1, reducer).finished(params, images(4), carry=apply.buffers, key=KEY)


def test_refusals():
    for bad in (0, -1.0, float("inf"), float("nan"), True, "1", None, torch.tensor(1.0)):
        with pytest.raises(ft.ArgumentError, match="clip_per_example: norm must be a finite number above 0"):
            reduce.clip_per_example(bad)
        with pytest.raises(ft.ArgumentError, match="private: norm must be a finite number above 0"):
            reduce.private(bad, 1.0)
        if bad is not None:
            with pytest.raises(ft.ArgumentError, match="private: size must be a finite number above 0"):
                reduce.private(1.0, 1.0, size=bad)
        if bad != 0:
            with pytest.raises(ft.ArgumentError, match="private: noise must be a finite number at least 0"):
                reduce.private(1.0, bad)


def test_it_says_what_it_is():
    assert repr(reduce.private(1, 1.1, size=25.6)) == "reduce.private(1, 1.1, size=25.6)"
    text = str(ft.explain(ft.parallel(ft.grad(net_loss), 4, reduce.clip_per_example(0.5))))
    assert "clip_per_example(0.5)" in text
    assert "sums over examples add up" in text
