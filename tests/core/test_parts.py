"""Parts that add to gradients or take from them: decay, centralisation, noise; and the laws of all parts."""

from __future__ import annotations

import functools

import pytest
import torch
from instances import keyed_loss, net_batch, net_params, random_tree
from updating import run, run_torch

import functrain as ft
from functrain.core import optim
from functrain.testing import check_optimizer, equal, same_bits

PARTS = {
    "clip": optim.clip(0.5),
    "clip_by_norm": optim.clip_by_norm(1.0),
    "clip_adaptive": optim.clip_adaptive(0.1, eps=0.5),
    "decay": optim.decay(0.1),
    "decay where": optim.decay(0.1, "*w", decoupled=True),
    "centralise": optim.centralise(),
    "noise": optim.noise(0.01),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_obeys_the_laws_of_optimizers(name):
    check_optimizer(PARTS[name], steps=3)
    check_optimizer(PARTS[name], net_params(0, torch.bfloat16), steps=2, transforms=False)


@pytest.mark.parametrize("fused", [False, True])
def test_decay_before_an_optimizer_is_torchs_l2(fused):
    params = net_params(0, torch.float64)

    def decayed(leaves):
        other = torch.optim.SGD(leaves, lr=0.1, momentum=0.9, weight_decay=0.2)
        return lambda count: other.step()

    got, _ = run(optim.chain(optim.decay(0.2), optim.sgd(0.1, momentum=0.9)), params, 20, fused=fused)
    equal("params", got, run_torch(decayed, params, 20), 1e-9)


def test_decoupled_decay_after_an_optimizer_is_adamws_of_the_same_share():
    params = net_params(0, torch.float64)

    def decayed(leaves):
        other = torch.optim.AdamW(leaves, lr=0.1, weight_decay=0.2)
        return lambda count: other.step()

    got, _ = run(optim.chain(optim.adam(0.1), optim.decay(0.1 * 0.2, decoupled=True)), params, 20)
    equal("params", got, run_torch(decayed, params, 20), 1e-9)


def test_decay_of_some_leaves_leaves_the_others():
    params, zero = net_params(), functools.partial(torch.zeros_like)
    for where in ("*w", ["hidden.w"], lambda path: path.endswith("w")):
        part = optim.decay(0.5, where)
        updates, _ = part.update(ft.tree.map(zero, params), part.init(params), params)
        for path, leaf in ft.tree.named(updates).items():
            same_bits(path, leaf, ft.tree.named(params)[path] * (0.5 if path == "hidden.w" else 0.0))
    with pytest.raises(ft.TreeError, match=r"'\*weight' matches no path of params; they are 'hidden.b'"):
        optim.decay(0.5, "*weight").init(params)


def test_centralised_gradients_have_no_mean_over_inputs():
    grads = random_tree({"w": (3, 4), "kernel": (2, 3, 2, 2), "v": (5,), "scalar": (), "empty": (0, 2), "hollow": (2, 0)}, 0)
    part = optim.centralise()
    found, _ = part.update(grads, part.init(grads), grads)
    for name in ("v", "scalar", "empty", "hollow"):
        same_bits(name, found[name], grads[name])
    for name in ("w", "kernel"):
        rows = grads[name].double().numpy().reshape(len(grads[name]), -1)
        expected = torch.tensor(rows - rows.mean(1, keepdims=True)).reshape(grads[name].shape)
        equal(name, found[name].double(), expected, 1e-6)


def test_noise_has_the_papers_variance_and_fades():
    params = {"a": torch.zeros(3000), "b": torch.zeros(1000, 2, dtype=torch.float64)}
    params |= {"c": torch.zeros((), dtype=torch.bfloat16)}
    part = optim.noise(0.3, gamma=0.55)
    state, seen = part.init(params), []
    for count in range(8):
        updates, state = part.update(params, state, params, key=ft.random.key(count))
        assert updates["c"].dtype == torch.bfloat16
        drawn = torch.cat([updates["a"].double(), updates["b"].reshape(-1)])
        # Five standard errors of a variance of 5000 numbers.
        assert drawn.var().item() == pytest.approx(0.3 / (1 + count) ** 0.55, rel=5 * (2 / 5000) ** 0.5)
        assert abs(drawn.mean().item()) < 5 * (0.3 / 5000) ** 0.5
        seen.append(drawn)
    correlations = torch.corrcoef(torch.stack(seen)) - torch.eye(8)
    assert correlations.abs().max() < 0.08


def test_every_noise_of_a_chain_and_every_position_draws_its_own():
    class Heard:
        """A part that writes down what comes in."""

        def __init__(self):
            self.rows = []

        def init(self, params):
            return ()

        def update(self, grads, state, params):
            self.rows.append(grads)
            return ft.tree.map(torch.zeros_like, grads), state

    first, second = Heard(), Heard()
    same = optim.noise(1.0, gamma=0.0)
    step = ft.step(ft.grad(keyed_loss), optim.chain(same, first, same, second))
    state = step.init(net_params(), seed=3)
    for _ in range(2):
        state, _ = step(state, net_batch(2))
    kept = ft.grad(keyed_loss).finished(net_params(), net_batch(2), key=ft.random.fold_in(ft.random.key(3), 0)).grads
    one, other = (ft.tree.ravel(heard.rows[0])[0] for heard in (first, second))
    again = ft.tree.ravel(second.rows[1])[0]
    one = one - ft.tree.ravel(kept)[0]
    assert one.std() > 0.5
    assert len({tuple(drawn.tolist()) for drawn in (one, other, again)}) == 3
    again = step.init(net_params(), seed=3)
    step(again, net_batch(2))
    same_bits("the same seed", second.rows[2], second.rows[0])


def test_refusals():
    for make, name in ((optim.decay, "weight_decay"), (optim.noise, "eta"), (lambda g: optim.noise(1.0, gamma=g), "gamma")):
        with pytest.raises(ft.ArgumentError, match=f"{name} must be a number of at least 0"):
            make(-0.1)
    for where in ((), [], [1], {"*": "x"}, 3):
        with pytest.raises(ft.ArgumentError, match="where is a glob"):
            optim.decay(0.1, where)
    with pytest.raises(ft.TreeError, match="'' matches no path"):
        optim.decay(0.1, "").init(net_params())
