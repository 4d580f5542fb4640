"""Bench `unroll`: the gradient of a validation loss through sixteen steps of training, against TorchOpt and JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy
import optax
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import functrain as ft
from bench import networks
from bench.jaxed import translated
from bench.networks import Work, loss_of
from bench.race import Result, compare, race
from tests.allocated import peak

STEPS = 16
ROOT = 1e-20
PLAIN, CHECKPOINTED, COMPILED = "all kept", "checkpointed", "compiled, all kept"
TORCHOPT, JAX = "TorchOpt, functional", "JAX jit, scan, optax"


class Case(NamedTuple):
    """One rule in three libraries, each a function of its learning rate."""

    name: str
    rate: float
    ours: ft.optim.Optimizer
    torchopt: Callable[[Any], Any]
    optax: Callable[[Any], Any]


CASES = (
    Case(
        "SGD with momentum",
        0.05,
        ft.optim.sgd(0.05, momentum=0.9),
        partial(torchopt.sgd, momentum=0.9, moment_requires_grad=False),
        partial(optax.sgd, momentum=0.9),
    ),
    # Where a gradient is exactly 0, the derivative of the root of Adam's second moment is NaN in the others without `eps_root`.
    Case(
        "AdamW",
        1e-3,
        ft.optim.adamw(1e-3),
        partial(torchopt.adamw, eps_root=ROOT),
        partial(optax.adamw, weight_decay=1e-2, eps_root=ROOT),
    ),
)


def run() -> list[Result]:
    """Race d loss / d (learning rate, initial params) through SGD with momentum and through AdamW."""
    work = networks.small()
    return [result for case in CASES for result in _hypergradients(case, work)] + [_memory(work)]


def _hypergradients(case: Case, work: Work) -> list[Result]:
    batches = {name: torch.stack([leaf.roll(shift, 0) for shift in range(STEPS)]) for name, leaf in work.batch.items()}
    valid = networks.data([64, networks.LABELS], 2 * 128)
    valid = {name: leaf[128:] for name, leaf in valid.items()}
    ours = {PLAIN: ours_by_autograd(case, work, batches, valid, False)}
    ours[CHECKPOINTED] = ours_by_autograd(case, work, batches, valid, True)
    if case.name != "AdamW":
        # Inductor takes a minute and a half for the graph of SGD's sixteen steps, and many for AdamW's.
        ours[COMPILED] = ours_compiled(case, work, batches, valid)
    contestants = ours | {
        TORCHOPT: by_torchopt(case, work, batches, valid),
        JAX: by_jax(case, work, batches, valid),
    }
    check_same_gradient(contestants)
    times = race(contestants, rounds=11)
    name = f"{work.name}; d loss / d (rate, params) through {STEPS} steps of {case.name}"
    return [
        result for kind in ours for result in compare("unroll", f"{name}; {kind}", times, kind, {TORCHOPT: None, JAX: None})
    ]


Leaves = dict[str, Tensor]
Hypergradient = Callable[[], tuple[Any, list[Any]]]
"""The derivative with respect to the rate, and to each leaf of the params in the order of the layers."""


def _objective(case: Case, work: Work, batches: Leaves, checkpoint: bool) -> tuple[Any, Callable[[Any, Leaves], Tensor]]:
    params, apply = ft.functional(work.module())
    loss = loss_of(apply)
    train = ft.unroll(ft.step(ft.grad(loss), case.ours), ft.tree.batch_size(batches), checkpoint=checkpoint)

    def validated(learnt: Any, valid: Leaves) -> Tensor:
        state, _ = train(ft.with_hyper(train.init(learnt["params"]), lr=learnt["rate"]), batches)
        return loss(state.params, valid)

    return {"params": params, "rate": torch.tensor(case.rate)}, validated


def ours_by_autograd(case: Case, work: Work, batches: Leaves, valid: Leaves, checkpoint: bool) -> Hypergradient:
    """The gradient that `ft.grad` takes, uncompiled."""
    learnt, validated = _objective(case, work, batches, checkpoint)
    grad = ft.grad(validated)

    def hypergradient() -> tuple[Any, list[Any]]:
        grads = grad.finished(learnt, valid).grads
        return grads["rate"], list(grads["params"].values())

    return hypergradient


def ours_compiled(case: Case, work: Work, batches: Leaves, valid: Leaves) -> Hypergradient:
    """The same as one graph: a step that changes nothing, and measures the gradient."""
    learnt, validated = _objective(case, work, batches, False)
    grad = ft.grad(validated)

    def measured(state: Any, batch: Any) -> tuple[Any, Any]:
        taken = grad.finished(state.params, batch)
        return state, {"loss": taken.loss, "grads": taken.grads}

    meta = ft.step(grad, ft.optim.sgd(0.0))
    compiled = ft.compiled(ft.Step(meta.init, measured, meta.stage), donate=False)
    state = meta.init(learnt)

    def hypergradient() -> tuple[Any, list[Any]]:
        grads: Any = compiled(state, valid)[1]["grads"]
        return grads["rate"], list(grads["params"].values())

    return hypergradient


def by_torchopt(case: Case, work: Work, batches: Leaves, valid: Leaves) -> Hypergradient:
    """The functional optimizers of TorchOpt, and torch's autograd through their updates."""
    module = work.module()

    def loss(params: Leaves, batch: Leaves) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(module, params, (batch["x"],)), batch["y"])

    apart = ft.tree.unstack(batches)

    def hypergradient() -> tuple[Any, list[Any]]:
        rate = torch.tensor(case.rate, requires_grad=True)
        initial = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
        optimizer = case.torchopt(rate)
        params, state = initial, optimizer.init(initial)
        for batch in apart:
            grads = torch.autograd.grad(loss(params, batch), list(params.values()), create_graph=True)
            updates, state = optimizer.update(dict(zip(params, grads)), state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        found = torch.autograd.grad(loss(params, valid), [rate, *initial.values()])
        return found[0], list(found[1:])

    return hypergradient


def by_jax(case: Case, work: Work, batches: Leaves, valid: Leaves) -> Hypergradient:
    """jax.grad through a scan of optax's updates, jitted."""
    initial, apply = translated(work.module())

    def loss(params: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["x"]), batch["y"]).mean()

    def validated(rate: Any, params: Any, batches: Any, valid: Any) -> Any:
        optimizer = case.optax(rate)

        def one(kept: Any, batch: Any) -> Any:
            params, state = kept
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(one, (params, optimizer.init(params)), batches)
        return loss(params, valid)

    gradient = jax.jit(jax.grad(validated, argnums=(0, 1)))
    given = [{name: jnp.array(leaf.numpy()) for name, leaf in each.items()} for each in (batches, valid)]

    def hypergradient() -> tuple[Any, list[Any]]:
        rate, grads = jax.block_until_ready(gradient(jnp.array(case.rate), initial, *given))
        return rate, [leaf.T for own in grads for leaf in (own.get("weight"), own.get("bias")) if leaf is not None]

    return hypergradient


def check_same_gradient(contestants: Mapping[str, Hypergradient], digits: float = 1e-2) -> None:
    """Raise when the contestants' gradients differ by more than `digits` of their length, in the rate or in any leaf."""
    found = {
        name: [numpy.asarray(leaf) for leaf in (rate, *leaves)] for name, run in contestants.items() for rate, leaves in [run()]
    }
    first = next(iter(found.values()))
    for name, leaves in found.items():
        off = [
            float(numpy.linalg.norm(leaf - mine) / numpy.linalg.norm(mine)) for leaf, mine in zip(leaves, first, strict=True)
        ]
        if not max(off) < digits:
            raise RuntimeError(f"{name} does not take the same gradient: leaves are off by {off} of their length")


def _memory(work: Work) -> Result:
    """Bytes at the worst moment of a gradient through 64 steps, checkpointed against all kept: the ratio is one of bytes."""
    batches = {name: leaf.expand(64, *leaf.shape) for name, leaf in work.batch.items()}
    kept, checkpointed = (
        peak(ours_by_autograd(CASES[0], work, batches, work.batch, checkpoint)) for checkpoint in (False, True)
    )
    name = f"{work.name}; d loss / d (rate, params) through 64 steps of {CASES[0].name}: memory"
    note = f"{checkpointed / 2**20:.1f} MiB for {kept / 2**20:.1f}"
    return Result("unroll", f"{name}, {note}; {CHECKPOINTED}", f"ours, {PLAIN}", checkpointed / kept, None, None, None)
