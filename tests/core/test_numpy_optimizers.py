"""Optimizers that torch.optim lacks follow their formulas, written a second time in NumPy, over 100 steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import functrain as ft
from functrain.core.optim import apply_updates
from functrain.testing import equal

SHAPES = {"matrix": (3, 2), "vector": (4,), "scalar": (), "kernel": (2, 1, 2, 2), "empty": (0, 3)}
LR = 0.02


# --- the formulas: `rule(p, g, memory, t, **options)` gives the new p; memory is a dict that starts empty ---------------


def lamb(p, g, memory, t, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, min_norm=0.0, max_norm=np.inf, **flags):
    decoupled = flags.get("decoupled", True)
    g = g if decoupled else g + weight_decay * p
    memory["m"] = b1 * memory.get("m", 0 * p) + (1 - b1 if flags.get("grad_averaging", True) else 1.0) * g
    memory["v"] = b2 * memory.get("v", 0 * p) + (1 - b2) * g**2
    bias1, bias2 = (1 - b1**t, 1 - b2**t) if flags.get("bias_correction", True) else (1.0, 1.0)
    u = memory["m"] / bias1 / (np.sqrt(memory["v"] / bias2) + eps)
    if decoupled:
        u = u + weight_decay * p
    of, by = float(np.clip(np.sqrt((p**2).sum()), min_norm, max_norm)), float(np.sqrt((u**2).sum()))
    return p - LR * (of / by if of > 0 and by > 0 else 1.0) * u


def lion(p, g, memory, t, b1=0.9, b2=0.99, weight_decay=0.0):
    m = memory.get("m", 0 * p)
    memory["m"] = b2 * m + (1 - b2) * g
    return p - LR * (np.sign(b1 * m + (1 - b1) * g) + weight_decay * p)


def schedule_free(
    p, g, memory, t, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0
):
    """Kept are x and z themselves, and y is made of them: ours keeps z, and moves y."""
    x, z = memory.get("x", p), memory.get("z", p)
    rate = LR * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
    memory["largest"] = max(memory.get("largest", 0.0), rate)
    weight = t**r * memory["largest"] ** weight_lr_power
    memory["sum"] = memory.get("sum", 0.0) + weight
    c = weight / memory["sum"]
    memory["v"] = b2 * memory.get("v", 0 * p) + (1 - b2) * g**2
    memory["z"] = z - rate * (g / (np.sqrt(memory["v"] / (1 - b2**t)) + eps) + weight_decay * p)
    memory["x"] = (1 - c) * x + c * memory["z"]
    return (1 - b1) * memory["z"] + b1 * memory["x"]


CASES = {
    "lamb": (ft.optim.lamb, lamb, {}),
    "lamb numbers": (ft.optim.lamb, lamb, {"b1": 0.8, "b2": 0.99, "eps": 1e-4, "weight_decay": 0.0}),
    "lamb coupled": (ft.optim.lamb, lamb, {"weight_decay": 0.3, "decoupled": False}),
    "lamb uncorrected": (ft.optim.lamb, lamb, {"bias_correction": False}),
    "lamb summed": (ft.optim.lamb, lamb, {"grad_averaging": False}),
    "lamb bounded": (ft.optim.lamb, lamb, {"min_norm": 0.6, "max_norm": 1.5}),
    "lion": (ft.optim.lion, lion, {}),
    "lion numbers": (ft.optim.lion, lion, {"b1": 0.95, "b2": 0.98, "weight_decay": 0.1}),
    "schedule_free": (ft.optim.schedule_free, schedule_free, {}),
    "schedule_free numbers": (ft.optim.schedule_free, schedule_free, {"b1": 0.5, "b2": 0.99, "eps": 1e-4, "weight_decay": 0.1}),
    "schedule_free warmed": (ft.optim.schedule_free, schedule_free, {"warmup_steps": 30}),
    "schedule_free weighted": (ft.optim.schedule_free, schedule_free, {"warmup_steps": 7, "r": 0.5, "weight_lr_power": 1.0}),
}


def start(dtype):
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def noises(dtype, steps):
    draw = np.random.default_rng(1)
    return [{name: draw.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()} for _ in range(steps)]


def by_numpy(rule, options, dtype, steps):
    """Params after some steps down a noisy quadratic bowl, and the rule's memory by leaf."""
    params, memory = start(dtype), {name: {} for name in SHAPES}
    for t, noise in enumerate(noises(dtype, steps), 1):
        params = {name: rule(p, p + noise[name], memory[name], t, **options) for name, p in params.items()}
    return params, memory


def tensors(arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


def by_functrain(optimizer, dtype, steps, fused):
    params = tensors(start(dtype))
    state = optimizer.init(params)
    for noise in map(tensors, noises(dtype, steps)):
        grads = ft.tree.map(torch.add, params, noise)
        if fused:
            params, state = optimizer.fused(grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_a_hundred_steps_follow_the_formula(name, dtype, tolerance):
    build, rule, options = CASES[name]
    expected, _ = by_numpy(rule, options, dtype, 100)
    for fused in (False, True):
        got, _ = by_functrain(build(LR, **options), dtype, 100, fused)
        equal(f"{name}, fused={fused}", got, tensors(expected), tolerance)


def test_the_average_of_schedule_free_training():
    options = CASES["schedule_free weighted"][2]
    optimizer = ft.optim.schedule_free(LR, **options)
    _, memory = by_numpy(schedule_free, options, "float64", 50)
    params, state = by_functrain(optimizer, "float64", 50, fused=False)
    expected = {name: torch.tensor(of["x"]) for name, of in memory.items()}
    equal("x", ft.optim.schedule_free_params(state, params), expected)
    other = by_functrain(ft.optim.schedule_free(LR), "float64", 50, fused=True)
    many = ft.tree.stack([(state, params), other[::-1]])
    for got, (one, its) in zip(ft.tree.unstack(ft.optim.schedule_free_params(*many)), [(state, params), other[::-1]]):
        equal("of a population", got, ft.optim.schedule_free_params(one, its))
    trained = ft.step(ft.grad(lambda p, b: (p["w"] - b) ** 2), optimizer).init({"w": torch.ones(2)})
    equal("of a step", ft.optim.schedule_free_params(trained, trained.params), trained.params)
    with pytest.raises(ft.ArgumentError, match="found none in AdamState"):
        ft.optim.schedule_free_params(ft.optim.adam(0.1).init(params), params)
    with pytest.raises(ft.TreeError, match="structure"):
        ft.optim.schedule_free_params(state, {"other": torch.ones(2)})


def test_the_average_settles_where_the_iterates_do_not():
    # At a constant rate the params of a noisy problem keep moving by about the rate; their average does not.
    optimizer = ft.optim.schedule_free(0.1)
    params = {"w": torch.full((200,), 3.0, dtype=torch.float64)}
    state = optimizer.init(params)
    draw = np.random.default_rng(2)
    for _ in range(300):
        grads = {"w": params["w"] + torch.tensor(draw.normal(size=200))}
        params, state = optimizer.fused(grads, state, params)
    average = ft.optim.schedule_free_params(state, params)["w"]
    assert average.square().mean() < 0.3 * state.z["w"].square().mean()
    assert average.square().mean() < 0.05


def test_a_leaf_without_a_norm_moves_as_adam_would():
    params = {"w": torch.zeros(3), "b": torch.ones(3)}
    grads = {"w": torch.tensor([1.0, -2.0, 3.0]), "b": torch.zeros(3)}
    lamb, adam = ft.optim.lamb(0.1, weight_decay=0.0, eps=1e-8), ft.optim.adam(0.1)
    updates, _ = lamb.update(grads, lamb.init(params), params)
    equal("trust ratio of 1", updates, adam.update(grads, adam.init(params), params)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.optim.lamb(-0.1), "lr must be a number of at least 0"),
        (lambda: ft.optim.lamb(0.1, b1=1.0), r"b1 must be a number in \[0, 1\)"),
        (lambda: ft.optim.lamb(0.1, eps=float("nan")), "eps must be"),
        (lambda: ft.optim.lamb(0.1, weight_decay=-1), "weight_decay must be"),
        (lambda: ft.optim.lamb(0.1, min_norm=2.0, max_norm=1.0), "bounds of φ in this order"),
        (lambda: ft.optim.lion(float("inf")), "lr must be"),
        (lambda: ft.optim.lion(0.1, b2=-0.1), r"b2 must be a number in \[0, 1\)"),
        (lambda: ft.optim.lion(True), "lr must be"),
        (lambda: ft.optim.schedule_free(0.1, b1=0.0), "b1 must be a number above 0"),
        (lambda: ft.optim.schedule_free(0.1, b1=ft.optim.cosine(0.9, 10)), "b1 must be a number above 0"),
        (lambda: ft.optim.schedule_free(0.1, warmup_steps=-1), "warmup_steps must be"),
        (lambda: ft.optim.schedule_free("0.1"), "lr must be"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ft.ArgumentError, match=message):
        call()
