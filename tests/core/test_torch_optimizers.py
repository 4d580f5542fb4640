"""Law 11: optimizers that torch.optim has follow it over 100 steps, for every option that both have."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from instances import random_tree
from updating import run, run_torch

import functrain as ft
from functrain.core.errors import ArgumentError, TreeError
from functrain.testing import check_optimizer, equal, same_bits

DTYPES = [torch.float64, torch.float32]
SHAPES = {"scalar": (), "vector": (5,), "matrix": (3, 4), "kernel": (4, 3, 2, 2), "empty": (0, 3)}
MATRICES = {"wide": (3, 4), "tall": (5, 2), "kernel": (4, 3, 2, 2), "empty": (0, 3)}
# torch's Adafactor divides by the number of elements.
TREES = {ft.optim.muon: MATRICES, ft.optim.adafactor: {name: SHAPES[name] for name in SHAPES if name != "empty"}}
amsgrad_coupled = functools.partial(torch.optim.Adam, amsgrad=True)
amsgrad_decoupled = functools.partial(torch.optim.AdamW, amsgrad=True)
# Ours, torch's, and the options as torch names them.
TORCH = {
    "sgd": (ft.optim.sgd, torch.optim.SGD, {}),
    "sgd decay": (ft.optim.sgd, torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd momentum": (ft.optim.sgd, torch.optim.SGD, {"momentum": 0.9}),
    "sgd dampening": (ft.optim.sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd nesterov": (ft.optim.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (ft.optim.adam, torch.optim.Adam, {}),
    "adam decay": (ft.optim.adam, torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": (ft.optim.adamw, torch.optim.AdamW, {}),
    "amsgrad": (ft.optim.amsgrad, amsgrad_coupled, {"betas": (0.8, 0.9)}),
    "amsgrad decay": (ft.optim.amsgrad, amsgrad_coupled, {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}),
    "amsgrad decoupled": (
        functools.partial(ft.optim.amsgrad, decoupled_weight_decay=True),
        amsgrad_decoupled,
        {"betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    "adamax": (ft.optim.adamax, torch.optim.Adamax, {}),
    "adamax decay": (ft.optim.adamax, torch.optim.Adamax, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    "nadam": (ft.optim.nadam, torch.optim.NAdam, {}),
    "nadam decay": (
        ft.optim.nadam,
        torch.optim.NAdam,
        {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "momentum_decay": 0.1},
    ),
    "nadam decoupled": (ft.optim.nadam, torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (ft.optim.radam, torch.optim.RAdam, {}),
    "radam decay": (ft.optim.radam, torch.optim.RAdam, {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    "radam decoupled": (ft.optim.radam, torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam never rectified": (ft.optim.radam, torch.optim.RAdam, {"betas": (0.9, 0.65)}),
    "rmsprop": (ft.optim.rmsprop, torch.optim.RMSprop, {}),
    "rmsprop decay": (ft.optim.rmsprop, torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1}),
    "rmsprop momentum": (ft.optim.rmsprop, torch.optim.RMSprop, {"momentum": 0.9}),
    "rmsprop centered": (ft.optim.rmsprop, torch.optim.RMSprop, {"centered": True}),
    "rmsprop all": (
        ft.optim.rmsprop,
        torch.optim.RMSprop,
        {"alpha": 0.9, "centered": True, "momentum": 0.5, "weight_decay": 0.1},
    ),
    "adagrad": (ft.optim.adagrad, torch.optim.Adagrad, {}),
    "adagrad decay": (ft.optim.adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1}),
    "adagrad start": (ft.optim.adagrad, torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    "adadelta": (ft.optim.adadelta, torch.optim.Adadelta, {"lr": 1.0}),
    "adadelta decay": (ft.optim.adadelta, torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    "adafactor": (ft.optim.adafactor, torch.optim.Adafactor, {}),
    "adafactor rate": (ft.optim.adafactor, torch.optim.Adafactor, {"lr": 0.3, "weight_decay": 0.1}),
    "adafactor all": (
        ft.optim.adafactor,
        torch.optim.Adafactor,
        {"beta2_decay": -0.5, "eps": (1e-3, 0.1), "d": 1.5, "weight_decay": 0.1},
    ),
    "muon": (ft.optim.muon, torch.optim.Muon, {}),
    "muon plain": (ft.optim.muon, torch.optim.Muon, {"nesterov": False, "momentum": 0.5, "weight_decay": 0.0}),
    "muon rms": (ft.optim.muon, torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw", "lr": 0.02}),
    "muon steps": (
        ft.optim.muon,
        torch.optim.Muon,
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 0.1, "weight_decay": 0.01},
    ),
}


def ours(name, **given):
    """Our optimizer for a row of the table, and its tree of shapes."""
    builder, _, options = TORCH[name]
    tuples = {"betas": ("b1", "b2"), "eps": ("eps1", "eps2")}
    renamed = {"lr": 0.01} | ({"ns_dtype": torch.bfloat16} if name.startswith("muon") else {})
    for option, value in options.items():
        several = isinstance(value, tuple) and option in tuples
        renamed |= dict(zip(tuples[option], value)) if several else {option: value}
    return builder(**{**renamed, **given}), TREES.get(builder, SHAPES)


def theirs(name, dtype, scheduler=None, **given):
    """torch's optimizer for a row of the table, as `run_torch` takes it."""
    builder, kind, options = TORCH[name]
    faster = {} if builder is ft.optim.muon else {"foreach": True}

    def start(leaves):
        other = kind(leaves, **{"lr": 0.01, **options, **given, **faster})
        rates = scheduler(other) if scheduler else None

        def take(count):
            # torch keeps NAdam's product of momenta in the default dtype.
            with default_dtype(dtype):
                other.step()
            if rates is not None:
                rates.step()

        return take

    return start


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def noises(size, dtype):
    return ft.random.normal(ft.random.key(size), (100, size), dtype)


def slope(params, count):
    """Gradients of a quadratic bowl, with noise of the count that does not depend on how a leaf is shaped."""
    return {name: p + noises(p.numel(), p.dtype)[count].reshape(p.shape) for name, p in params.items()}


def matrices(params):
    return {name: leaf.flatten(1) for name, leaf in params.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_a_hundred_steps_follow_torch(name, dtype):
    optimizer, shapes = ours(name)
    params = random_tree(shapes, 2, dtype)
    muon = optimizer.name == "muon"
    # Of Muon torch takes matrices alone, which is how ours sees kernels.
    seen = matrices if muon else dict
    expected = run_torch(theirs(name, dtype), seen(params), 100, slope)[-1]
    # Numbers that differ in float32's last bit are at times rounded apart to bfloat16, in which Muon iterates: one such
    # difference is up to lr · 2⁻⁸ of the step. In float64 there is hardly ever one, and `fused` rounds as torch does.
    close = 1e-9 if dtype == torch.float64 else 1e-5
    for fused, tolerance in ((False, 1e-3 if muon and dtype == torch.float32 else close), (True, close)):
        got = run(optimizer, params, 100, slope, fused)[0][-1]
        equal(f"{name}, fused={fused}", seen(got), expected, tolerance)


@pytest.mark.parametrize("name", ["sgd nesterov", "adamw", "nadam decoupled"])
def test_cosine_follows_torchs_cosine(name):
    optimizer, shapes = ours(name, lr=ft.optim.cosine(0.02, 60, end=0.001))
    params = random_tree(shapes, 3, torch.float64)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=60, eta_min=0.001)
    expected = run_torch(theirs(name, torch.float64, cosine, lr=0.02), params, 60, slope)[-1]
    for fused in (False, True):
        equal(name, run(optimizer, params, 60, slope, fused)[0][-1], expected, 1e-9)


# --- what torch cannot be asked ---------------------------------------------------------------------------------------

EVERY = ["sgd nesterov", "adamw", "amsgrad decoupled", "adamax decay", "nadam decay", "radam decay", "rmsprop all"]
EVERY += ["adagrad decay", "adadelta decay", "adafactor all", "muon"]
MIXED = {torch.float64: {"tall": (5, 2), "empty": (0, 3)}, torch.float32: {"kernel": (4, 3, 2, 2), "hole": (3, 0, 2)}}
VECTORS = {torch.float64: {"scalar": (), "nothing": (0,)}, torch.float32: {"vector": (5,), "single": ()}}


@pytest.mark.parametrize("name", EVERY)
def test_leaves_of_every_shape_and_dtype_obey_the_laws(name):
    # Of float64 all along: Newton–Schulz iterations in narrower dtypes, batched, round otherwise than alone.
    optimizer, _ = ours(name, **({"ns_dtype": torch.float64} if name == "muon" else {}))
    params = {str(dtype): random_tree(shapes, 4, dtype) for dtype, shapes in MIXED.items()}
    if name != "muon":
        params |= {f"vectors {dtype}": random_tree(shapes, 5, dtype) for dtype, shapes in VECTORS.items()}
    check_optimizer(optimizer, params, steps=3, differentiable=False)


@pytest.mark.parametrize("name", EVERY)
def test_params_in_bfloat16_are_updated_as_in_float32_and_rounded_once(name):
    optimizer, shapes = ours(name)
    half = random_tree(shapes, 5, torch.bfloat16)
    single = ft.tree.map(torch.Tensor.float, half)
    states = optimizer.init(half), optimizer.init(single)
    for count in range(2):
        grads = ft.tree.map(torch.Tensor.bfloat16, slope(single, count))
        updates, state = optimizer.update(grads, states[0], half)
        expected, wide_state = optimizer.update(ft.tree.map(torch.Tensor.float, grads), states[1], single)
        same_bits("updates", updates, ft.tree.map(torch.Tensor.bfloat16, expected))
        same_bits("state", state, wide_state)
        states = state, wide_state
    got, state = optimizer.fused(grads, states[0], half)
    expected, wide_state = optimizer.fused(ft.tree.map(torch.Tensor.float, grads), states[1], single)
    same_bits("fused params", got, ft.tree.map(torch.Tensor.bfloat16, expected))
    same_bits("fused state", state, wide_state)


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_muon_of_matrices_obeys_the_laws(options):
    params = random_tree({"wide": (2, 3), "tall": (3, 2), "kernel": (2, 1, 2, 2)}, 4, torch.float64)
    check_optimizer(ft.optim.muon(0.01, ns_dtype=torch.float64, **options), params, steps=3)


def test_the_centred_rmsprop_of_constant_gradients_stays_finite():
    # As a difference of two moments the variance goes below 0 here, and torch's update to NaN.
    params = {"w": torch.linspace(0.1, 30.0, 500)}
    optimizer = ft.optim.rmsprop(0.01, centered=True, alpha=0.5)
    for fused in (False, True):
        rows, _ = run(optimizer, params, 60, lambda params, count: {"w": torch.linspace(0.1, 30.0, 500)}, fused)
        assert rows[-1]["w"].isfinite().all()


def test_adafactor_with_the_papers_epsilon_leaves_zero_gradients_alone():
    params = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    optimizer = ft.optim.adafactor(0.1, eps1=1e-30)
    for fused in (False, True):
        rows, _ = run(optimizer, params, 2, lambda params, count: ft.tree.map(torch.zeros_like, params), fused)
        equal("params", rows[-1], params)


def orthogonalised(u, eps, coefficients, steps):
    a, b, c = coefficients
    x = u / max(np.sqrt((u * u).sum()), eps)
    x = x.T if len(u) > len(u.T) else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if len(u) > len(u.T) else x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.5, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 5.0},
    ],
)
def test_muon_in_float64_follows_its_formula(options):
    o = {"momentum": 0.95, "weight_decay": 0.1, "eps": 1e-7, "ns_steps": 5, "ns_coefficients": (3.4445, -4.775, 2.0315)}
    o = {**o, "nesterov": True, "adjust_lr_fn": "original", **options}
    params = random_tree(MATRICES, 6, torch.float64)
    expected = {}
    for name, leaf in params.items():
        p, noise = leaf.flatten(1).numpy(), noises(leaf.numel(), torch.float64).numpy()
        b, (rows, columns) = np.zeros_like(p), p.shape
        scale = max(1, rows / columns) ** 0.5 if o["adjust_lr_fn"] == "original" else 0.2 * max(rows, columns) ** 0.5
        for count in range(100):
            g = p + noise[count].reshape(p.shape)
            b = o["momentum"] * b + (1 - o["momentum"]) * g
            u = o["momentum"] * b + (1 - o["momentum"]) * g if o["nesterov"] else b
            x = orthogonalised(u, o["eps"], o["ns_coefficients"], o["ns_steps"])
            p = p - 0.02 * (o["weight_decay"] * p + scale * x)
        expected[name] = torch.from_numpy(p)
    optimizer = ft.optim.muon(0.02, ns_dtype=torch.float64, **options)
    for fused in (False, True):
        equal(f"fused={fused}", matrices(run(optimizer, params, 100, slope, fused)[0][-1]), expected, 1e-9)


# --- what is refused --------------------------------------------------------------------------------------------------

NUMBERS = {
    ft.optim.amsgrad: ("lr", "eps", "weight_decay"),
    ft.optim.adamax: ("lr", "eps", "weight_decay"),
    ft.optim.nadam: ("lr", "eps", "weight_decay", "momentum_decay"),
    ft.optim.radam: ("lr", "eps", "weight_decay"),
    ft.optim.rmsprop: ("lr", "eps", "weight_decay", "momentum"),
    ft.optim.adagrad: ("lr", "eps", "weight_decay", "lr_decay", "initial_accumulator_value"),
    ft.optim.adadelta: ("lr", "eps", "weight_decay"),
    ft.optim.adafactor: ("lr", "eps1", "eps2", "weight_decay"),
    ft.optim.muon: ("lr", "eps", "weight_decay"),
}
SHARES = {
    **dict.fromkeys((ft.optim.amsgrad, ft.optim.adamax, ft.optim.nadam, ft.optim.radam), ("b1", "b2")),
    ft.optim.rmsprop: ("alpha",),
    ft.optim.adadelta: ("rho",),
    ft.optim.muon: ("momentum",),
}


@pytest.mark.parametrize("builder", NUMBERS, ids=lambda builder: builder.__name__)
def test_numbers_that_are_none_are_refused(builder):
    for name in NUMBERS[builder]:
        for wrong in (-0.1, float("nan"), float("inf"), "0.1"):
            with pytest.raises(ArgumentError, match=f"^{name} must be a number"):
                builder(**{name: wrong})
    for name in SHARES.get(builder, ()):
        for wrong in (-0.1, 1.0, 2):
            with pytest.raises(ArgumentError, match=rf"^{name} must be a number in \[0, 1\)"):
                builder(**{name: wrong})
    with pytest.raises(ArgumentError, match=r"^lr is on the schedule"):
        builder(ft.optim.constant(-1.0))


def test_options_that_there_are_not_are_refused():
    with pytest.raises(ArgumentError, match="beta2_decay must be a number"):
        ft.optim.adafactor(beta2_decay=0.8)
    with pytest.raises(ArgumentError, match="d must be a number of at least 1"):
        ft.optim.adafactor(d=0.5)
    with pytest.raises(ArgumentError, match="initial_accumulator_value must be a number"):
        ft.optim.adagrad(initial_accumulator_value=ft.optim.constant(0.1))
    with pytest.raises(ArgumentError, match="adjust_lr_fn must be one of 'original', 'match_rms_adamw', got 'rms'"):
        ft.optim.muon(adjust_lr_fn="rms")
    for steps in (0, 100, 2.0, True):
        with pytest.raises(ArgumentError, match="ns_steps must be a whole number from 1 to 99"):
            ft.optim.muon(ns_steps=steps)
    for coefficients in ((1.0, 2.0), (1.0, float("nan"), 2.0), ("a", "b", "c"), 3.0):
        with pytest.raises(ArgumentError, match="ns_coefficients must be three finite numbers"):
            ft.optim.muon(ns_coefficients=coefficients)
    for dtype in (torch.int64, torch.complex64, "bfloat16"):
        with pytest.raises(ArgumentError, match="ns_dtype must be a floating dtype"):
            ft.optim.muon(ns_dtype=dtype)


def test_muon_names_the_params_that_are_no_matrices():
    params = {"out": {"w": torch.ones(2, 2), "b": torch.ones(2)}, "scale": torch.tensor(1.0)}
    with pytest.raises(TreeError, match=r"not for 'out\.b', 'scale': .*ft\.optim\.partition"):
        ft.optim.muon().init(params)


@pytest.mark.parametrize("builder", NUMBERS, ids=lambda builder: builder.__name__)
def test_params_and_grads_of_other_kinds_are_refused_by_path(builder):
    optimizer, params = builder(), {"a": {"w": torch.ones(2, 3)}}
    for wrong in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.complex64)):
        with pytest.raises(TreeError, match=rf"'a\.w' is {wrong.dtype}"):
            optimizer.init({"a": {"w": wrong}})
    state = optimizer.init(params)
    for way in (optimizer.update, optimizer.fused):
        with pytest.raises(TreeError, match=r"gradient of 'a\.w' has shape \(3, 2\), the parameter \(2, 3\)"):
            way({"a": {"w": torch.ones(3, 2)}}, state, params)
        with pytest.raises(TreeError, match="structure of params"):
            way({"a": {"v": torch.ones(2, 3)}}, state, params)
        with pytest.raises(TreeError, match="this optimizer's init makes"):
            way(params, ft.optim.lion().init(params), params)
