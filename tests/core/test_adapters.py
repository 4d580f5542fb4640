"""Optimizers from elsewhere: torch's classes keep their bits, TorchOpt's and plain pairs of functions run as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from instances import net_batch, net_loss, net_params

import functrain as ft
from functrain.core.optim import apply_updates
from functrain.testing import check_optimizer, check_step, equal, same_bits

CLASSES = {
    "ASGD": {"lr": 0.01, "t0": 20.0, "weight_decay": 0.1},
    "Adadelta": {"rho": 0.8},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.99), "amsgrad": True},
    "AdamW": {"lr": 0.01, "foreach": True},
    "Adamax": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "NAdam": {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01, "step_sizes": (1e-5, 1)},
    "SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
}


class Counting(torch.optim.Optimizer):
    """A third party's class with many bad habits, none of which is to matter.

    It counts in Python numbers, in the group too; replaces `p.data`; works in the gradients; nests what it keeps.
    """

    def __init__(self, params, lr=0.1, growth=1.5, name="counting"):
        super().__init__(params, {"lr": lr, "growth": growth, "name": name, "total": 0, "weight": 1.0, "even": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["total"] += 1
            group["weight"] *= group["growth"]
            group["even"] = not group["even"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(count=0, rate=1.0, note=None, past=[torch.zeros_like(p), (torch.zeros_like(p),)])
                state["count"] += 1
                state["rate"] *= 0.99
                state["past"][0].lerp_(p.grad, 1 / state["count"])
                p.grad.mul_(group["weight"] / (group["weight"] + group["total"]))
                p.data = p.data - group["lr"] * state["rate"] * (p.grad + state["past"][0] + 0.1 * group["even"])


def matrices(params):
    return {path: leaf for path, leaf in ft.tree.named(params).items() if leaf.ndim == 2}


def tried_on(kind):
    """Params and a loss: a small network's, or for Muon its matrices alone, pulled towards the batch."""
    params = net_params(0)
    if kind is not torch.optim.Muon:
        return params, net_loss
    return matrices(params), lambda p, b: sum((leaf - b["x"].mean()).square().sum() for leaf in p.values()) + 0 * b["x"][:, 0]


@pytest.mark.parametrize("kind", [*(getattr(torch.optim, name) for name in CLASSES), Counting])
def test_a_run_has_the_bits_of_the_torch_optimizer(kind, tmp_path):
    options = CLASSES.get(kind.__name__, {})
    params, loss = tried_on(kind)
    grad = ft.grad(loss)
    step = ft.step(grad, ft.optim.from_torch(kind, **options))
    state = step.init(params)
    flat, spec = ft.tree.flatten(ft.tree.map(lambda leaf: leaf.clone().requires_grad_(), params))
    theirs = kind(flat, **options)
    batches = [net_batch(4, count) for count in range(5)]
    for count in range(100):
        batch = batches[count % 5]
        grads = grad.finished(ft.tree.unflatten(spec, [leaf.detach() for leaf in flat]), batch).grads
        for leaf, its in zip(flat, ft.tree.leaves(grads)):
            leaf.grad = its
        theirs.step()
        state, _ = step(state, batch)
        if count == 50:
            ft.save_tree(tmp_path / "state.safetensors", state)
            state = ft.load_tree(tmp_path / "state.safetensors", step.init(params))
    same_bits(kind.__name__, state.params, ft.tree.unflatten(spec, [leaf.detach() for leaf in flat]))


def test_every_class_of_torch_is_listed_here():
    found = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer"}
    assert found - {"LBFGS", "SparseAdam"} == set(CLASSES)


@pytest.mark.parametrize("donate", [False, True])
def test_steps_around_a_torch_optimizer(donate):
    step = ft.step(ft.grad(net_loss), ft.optim.from_torch(torch.optim.Adamax, lr=0.01), donate=donate)
    check_step(step, net_params(0), [net_batch(4, count) for count in range(3)])


def test_options_are_hyperparameters_where_they_are_floats():
    options = {"betas": (0.8, 0.99), "weight_decay": 0, "amsgrad": True}
    optimizer = ft.optim.from_torch(torch.optim.Adam, lr=ft.optim.cosine(0.1, 10), **options)
    params, grads = net_params(0), net_params(1)
    state = optimizer.init(params)
    floats = {name: value.item() for name, value in ft.tree.named(ft.hyper(state), "_").items()}
    expected = {"lr_peak": 0.1, "betas_0": 0.8, "betas_1": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    assert floats.items() >= expected.items()
    assert set(ft.explain(optimizer).facts) == {"lr", "betas_0", "betas_1", "eps", "weight_decay", "amsgrad"}
    # The native optimizer is another way to the same numbers, with the schedule and after a change of hyperparameters.
    native = ft.optim.amsgrad(ft.optim.cosine(0.1, 10), b1=0.5, b2=0.99, weight_decay=0.3)
    mine, its = (params, ft.with_hyper(state, betas_0=0.5, weight_decay=0.3)), (params, native.init(params))
    for _ in range(12):
        mine = optimizer.fused(grads, mine[1], ft.tree.map(torch.clone, mine[0]))
        updates, other = native.update(grads, its[1], its[0])
        its = apply_updates(its[0], updates), other
    equal("native", mine[0], its[0], 1e-6)


def test_a_scheduled_rate_is_in_the_metrics():
    step = ft.step(ft.grad(net_loss), ft.optim.from_torch(torch.optim.SGD, lr=ft.optim.piecewise(0.1, {1: 0.5})))
    state = step.init(net_params(0))
    rates = []
    for count in range(2):
        state, metrics = step(state, net_batch(4, count))
        rates.append(metrics["lr"].item())
    assert rates == [0.1, 0.05]


# --- what is refused ----------------------------------------------------------------------------------------------


class Private(torch.optim.SGD):
    """It keeps a count where nobody looks."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        self.param_groups[0]["params"][0].data.add_(self.count)


class Noisy(torch.optim.SGD):
    """It draws from the global generator."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.add_(torch.randn_like(p))


class Decaying(torch.optim.SGD):
    """It changes its own rate."""

    def step(self, closure=None):
        self.param_groups[0]["lr"] *= 0.5


class Opaque(torch.optim.SGD):
    """It keeps what is no tensor."""

    def step(self, closure=None):
        self.state[self.param_groups[0]["params"][0]]["kept"] = "text"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.optim.from_torch(torch.optim.LBFGS), "torch.optim.LBFGS needs a closure"),
        (lambda: ft.optim.from_torch(torch.optim.SparseAdam), "SparseAdam does not support dense gradients"),
        (lambda: ft.optim.from_torch(torch.optim.SGD, lr=-1.0), "Invalid learning rate: -1"),
        (lambda: ft.optim.from_torch(torch.optim.SGD, lr=float("inf")), "lr must be a number"),
        (lambda: ft.optim.from_torch(torch.optim.SGD, rate=0.1), "unexpected keyword argument 'rate'"),
        (lambda: ft.optim.from_torch(torch.optim.SGD([torch.zeros(1)])), "takes a class of optimizers"),
        (lambda: ft.optim.from_torch(ft.optim.adam), "takes a class of optimizers"),
        (lambda: ft.optim.from_torch(Private), "Private depends on more than its `state`"),
        (lambda: ft.optim.from_torch(Noisy), "global generator of random numbers"),
        (lambda: ft.optim.from_torch(Decaying, lr=0.1), "Decaying changes its option 'lr'"),
        (lambda: ft.optim.from_torch(Opaque, lr=0.1), "Opaque keeps a str in its state"),
        (lambda: ft.optim.from_torch(torch.optim.Muon).init(net_params(0)), "Muon only supports 2D parameters"),
    ],
)
def test_what_cannot_be_adapted_is_refused(call, message):
    before = torch.random.get_rng_state()
    with pytest.raises(ft.ArgumentError, match=message):
        call()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_updates_that_make_no_sense_are_refused():
    params, optimizer = {"w": torch.ones(2, 2)}, ft.optim.from_torch(torch.optim.SGD, lr=0.1)
    state = optimizer.init(params)
    with pytest.raises(ft.TreeError, match="sparse gradient of 'w'"):
        optimizer.update({"w": torch.ones(2, 2).to_sparse()}, state, params)
    with pytest.raises(ft.ArgumentError, match=r"keeps other things.*momentum_buffer"):
        optimizer.update(params, ft.with_hyper(state, momentum=0.9), params)
    with pytest.raises(ft.ArgumentError, match="Invalid learning rate"):
        optimizer.update(params, ft.with_hyper(state, lr=-0.1), params)
    with pytest.raises(ft.NonFiniteError, match="lr is nan"):
        optimizer.update(params, ft.with_hyper(state, lr=torch.tensor(float("nan"))), params)
    with pytest.raises(ft.TreeError, match="expected the TorchState"):
        optimizer.update(params, ft.optim.sgd(0.1).init(params), params)
    assert optimizer.init({}).kept == {}
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}


def after(step, state, batch):
    return lambda lr: step(ft.with_hyper(state, lr=lr), batch)[0].params["w"]


@pytest.mark.parametrize(
    ("around", "message"),
    [
        (lambda step, state, batch: ft.compiled(step)(state, batch), "take ft.optim.radam"),
        (lambda step, state, batch: ft.population(step)(ft.tree.stack([state, state]), batch), "take ft.optim.radam"),
        (lambda step, state, batch: torch.func.grad(after(step, state, batch))(torch.tensor(0.1)), "take ft.optim.radam"),
        (lambda step, state, batch: after(step, state, batch)(torch.tensor(0.1).requires_grad_()), "no gradient flows"),
    ],
)
def test_where_values_cannot_be_seen_the_native_optimizer_is_named(around, message):
    step = ft.step(ft.grad(lambda p, b: (p["w"] - b) ** 2), ft.optim.from_torch(torch.optim.RAdam, lr=0.1))
    with pytest.raises(ft.ArgumentError, match=message):
        around(step, step.init({"w": torch.tensor(1.0)}), torch.ones(2))


# --- TorchOpt -----------------------------------------------------------------------------------------------------


def test_torchopt_follows_torch_and_is_differentiable():
    torchopt = pytest.importorskip("torchopt")
    rate = torchopt.schedule.linear_schedule(0.1, 0.01, 5, 0)
    check_optimizer(ft.optim.from_torchopt(torchopt.adam(0.01, eps_root=1e-8)))
    check_optimizer(ft.optim.from_torchopt(torchopt.sgd(rate, momentum=0.9)))
    clipped = torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.sgd(rate))
    check_optimizer(ft.optim.from_torchopt(clipped), transforms=False)
    step, other = (
        ft.step(ft.grad(net_loss), optimizer)
        for optimizer in (ft.optim.from_torchopt(torchopt.adamw(0.01)), ft.optim.adamw(0.01))
    )
    state, expected = step.init(net_params(0, torch.float64)), other.init(net_params(0, torch.float64))
    for count in range(10):
        batch = net_batch(4, count, torch.float64)
        (state, _), (expected, _) = step(state, batch), other(expected, batch)
    # TorchOpt corrects the bias of its moments in float32.
    equal("adamw", state.params, expected.params, 1e-5)
    assert "torchopt" in str(ft.explain(step))
    for wrong in (torchopt.Adam, ft.optim.adam(0.1)):
        with pytest.raises(ft.ArgumentError, match="from_torchopt takes"):
            ft.optim.from_torchopt(wrong)


# --- pairs of functions from elsewhere --------------------------------------------------------------------------------


class Pair(NamedTuple):
    """What optax's optimizers are."""

    init: Any
    update: Any


class Averages(NamedTuple):
    """The state of a pair that knows nothing of functrain."""

    count: torch.Tensor
    mean: Any


def heavy_ball(rate, decay):
    def init(params):
        return Averages(torch.zeros((), dtype=torch.int64), ft.tree.map(torch.zeros_like, params))

    def update(grads, state, params):
        mean = ft.tree.map(lambda m, g: decay * m + g, state.mean, grads)
        return ft.tree.map(lambda m: -rate * m, mean), Averages(state.count + 1, mean)

    return Pair(init, update)


def test_a_pair_of_functions_runs_as_it_is(tmp_path):
    pair, loss = heavy_ball(0.05, 0.9), lambda params, batch: (params["w"] - batch) ** 2
    check_optimizer(pair)
    check_optimizer(ft.optim.chain(ft.optim.clip(0.1), pair))
    step, native = ft.step(ft.grad(loss), pair), ft.step(ft.grad(loss), ft.optim.sgd(0.05, momentum=0.9))
    batches = [torch.arange(3.0) * count for count in range(6)]
    check_step(step, {"w": torch.tensor(1.0)}, batches[:3])
    ways = {"plain": step, "guarded": ft.guard(step), "compiled": ft.compiled(ft.guard(step))}
    for name, way in ways.items():
        state, expected = way.init({"w": torch.tensor(1.0)}), native.init({"w": torch.tensor(1.0)})
        for count, batch in enumerate(batches):
            if count == 3:
                ft.save_tree(tmp_path / f"{name}.safetensors", state)
                state = ft.load_tree(tmp_path / f"{name}.safetensors", way.init({"w": torch.tensor(1.0)}))
            (state, _), (expected, _) = way(state, batch), native(expected, batch)
        equal(name, state.params, expected.params, 1e-5)
        assert state.opt.count == 6
        assert "Pair" in str(ft.explain(way))
    bad, metrics = ways["guarded"](step.init({"w": torch.tensor(1.0)}), batches[0] / 0)
    assert metrics["skipped"] == 1
    same_bits("a bad step leaves a pair's state", bad.opt, pair.init({"w": torch.tensor(1.0)}))
    assert ft.hyper(pair.init(net_params(0))) == {}
