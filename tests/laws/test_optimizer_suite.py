"""Laws 10 and 11 beyond single optimizers: adapters, combinations, all optimizers in one graph, and what breaks each law."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from instances import OPTIMIZERS, net_batch, net_loss, net_params, random_tree

import functrain as ft
from functrain.core.optim import apply_updates
from functrain.core.transforms import inside_transform
from functrain.testing import LawError, check_optimizer, equal, same_bits

MATRICES = {"w": torch.linspace(-1, 1, 6).reshape(3, 2), "v": torch.eye(2)}
REFUSED = ("Optimizer", "LBFGS", "SparseAdam")
ADAPTED = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in REFUSED}
SPLIT = {"w": "one", "*": "other"}
COMBINED = {
    "noisy": ft.optim.chain(ft.optim.noise(0.1), ft.optim.lookahead(ft.optim.lion(0.05), every=2)),
    "parted": ft.optim.partition({"one": ft.optim.schedule_free(0.05), "other": ft.optim.sgd(0.05)}, SPLIT),
    "frozen": ft.optim.freeze(ft.optim.skip_nonfinite(ft.optim.lamb(ft.optim.cosine(0.05, 9))), "b*"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_classes_of_torch_obey_the_laws(name):
    params = MATRICES if name == "Muon" else None
    check_optimizer(ft.optim.from_torch(ADAPTED[name], lr=0.05), params, transforms=False)


@pytest.mark.parametrize("name", COMBINED)
def test_combinations_obey_the_laws(name):
    check_optimizer(COMBINED[name])


def test_an_adapted_class_is_a_part_like_any_other():
    adapted = ft.optim.from_torch(torch.optim.Adamax, lr=ft.optim.cosine(0.05, 9))
    check_optimizer(ft.optim.chain(ft.optim.clip_by_norm(1.5), adapted), transforms=False)
    check_optimizer(ft.optim.partition({"one": adapted, "other": ft.optim.sgd(0.05)}, SPLIT), transforms=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_injected_rate_is_a_plain_one(name):
    params = net_params(0)
    injected, plain = (ft.step(ft.grad(net_loss), OPTIMIZERS[name](rate)) for rate in (0.5, 0.05))
    state, expected = ft.with_hyper(injected.init(params), lr=0.05), plain.init(params)
    for count in range(3):
        batch = net_batch(4, count)
        (state, _), (expected, _) = injected(state, batch), plain(expected, batch)
        same_bits(name, state, expected)


def test_all_optimizers_in_one_graph_are_the_same_step():
    # One of each kind; hashed noise is left out, as its rounds take as long to compile as all the rest.
    every = {"muon": ft.optim.muon(0.05, ns_dtype=torch.float64, ns_steps=2)}
    for build in OPTIMIZERS.values():
        one = build(0.05)
        every |= {one.name: one} if "key" not in one.uses else {}
    params = random_tree({name: {"w": (3, 2)} for name in every}, 0, torch.float64)

    def loss(params, batch):
        return sum(leaf.square().sum() for leaf in ft.tree.leaves(params)) * batch

    step = ft.step(ft.grad(loss), ft.optim.partition(every, lambda path: path.split(".")[0]))
    graph = ft.compiled(step)
    state, expected = step.init(params), step.init(params)
    for count in range(3):
        batch = torch.linspace(-1, 1, 4, dtype=torch.float64) + count
        (state, metrics), (expected, its) = graph(state, batch), step(expected, batch)
        equal(f"update {count}", (state, metrics), (expected, its), 1e-9)


# --- each law has something that breaks it ----------------------------------------------------------------------------


def plain(update, **fields):
    """An optimizer of one rate, by `update(grads, state, params) -> (updates, state)`."""
    made = ft.optim.sgd(0.1)
    return dataclasses.replace(made, update=update, fused=None, name="broken", **fields)


def rule(leafwise):
    """One that moves each leaf by `leafwise(grad, param, lr, steps)`."""

    def update(grads, state, params):
        lr, steps = state.hyper["lr"], state.steps
        updates = ft.tree.map(lambda g, p: leafwise(g, p, lr, steps).to(p.dtype), grads, params)
        return updates, state._replace(steps=steps + 1)

    return plain(update)


def counting():
    calls = []

    def update(grads, state, params):
        calls.append(None)
        return ft.tree.map(lambda g: -g / len(calls), grads), state

    return plain(update)


def in_place():
    return plain(lambda grads, state, params: (ft.tree.map(lambda g: g.mul_(-1), grads), state))


def wider():
    return plain(lambda grads, state, params: (ft.tree.map(lambda g: -g.double(), grads), state))


def growing():
    return plain(lambda grads, state, params: (grads, state._replace(momentum={"new": state.steps})))


def greedy():
    def fused(grads, state, params):
        updates, state = ft.optim.sgd(0.1).update(grads, state, params)
        ft.tree.map(torch.Tensor.zero_, grads)
        return apply_updates(params, updates), state

    return dataclasses.replace(ft.optim.sgd(0.1), fused=fused)


def forgetful():
    """What it keeps is in the memory of its state, behind what a file holds."""

    def update(grads, state, params):
        seen = getattr(state.steps, "seen", 0.0)
        new = state._replace(steps=state.steps + 1)
        new.steps.seen = seen + 1.0
        return ft.tree.map(lambda g: -(seen + 1.0) * g, grads), new

    return plain(update)


BROKEN = {
    "update changes nothing": in_place(),
    "update gives the same again": counting(),
    "updates are like params": wider(),
    "the state keeps its structure": growing(),
    "fused leaves the gradients as they are": greedy(),
    "saved and loaded, it goes on with the same bits": forgetful(),
    "vmap of update is the loop": rule(lambda g, p, lr, steps: -lr * g if g.sum() > -100 else g),
    "traced without values": rule(lambda g, p, lr, steps: -lr * g * (steps if inside_transform() else steps.item())),
    "derivative by grads": rule(lambda g, p, lr, steps: -lr * g.detach().clamp(min=-0.3)),
    "derivative by lr": rule(lambda g, p, lr, steps: -lr.detach() * g),
    "derivative by params": rule(lambda g, p, lr, steps: -lr * (g + p.detach() ** 2)),
    "where gradients are 0, derivatives are finite": rule(lambda g, p, lr, steps: -lr * (g + g.square().sum().sqrt())),
    "where params are 0, derivatives are finite": rule(lambda g, p, lr, steps: -lr * g * p.abs().sqrt()),
}


@pytest.mark.parametrize("law", BROKEN)
def test_the_checker_finds_what_breaks_a_law(law):
    with pytest.raises(LawError, match=law):
        check_optimizer(BROKEN[law])
