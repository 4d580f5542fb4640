"""A chain is its parts one after the other: the whole recipe follows torch's, in every way that it is run."""

from __future__ import annotations

import pytest
import torch
from instances import net_batch, net_loss, net_params
from updating import bowl, run, run_torch

import functrain as ft
from functrain.core import optim
from functrain.testing import check_optimizer, check_step, equal, same_bits


def clipped_adamw(leaves):
    other = torch.optim.AdamW(leaves, lr=0.02)

    def take(count):
        torch.nn.utils.clip_grad_norm_(leaves, 0.7)
        torch.nn.utils.clip_grad_value_(leaves, 0.3)
        other.step()

    return take


@pytest.mark.parametrize("fused", [False, True])
def test_clipping_before_adamw_follows_torch(fused):
    params = net_params(0, torch.float64)
    recipe = optim.chain(optim.clip_by_norm(0.7), optim.clip(0.3), optim.adamw(0.02))
    got, _ = run(recipe, params, 50, fused=fused)
    equal("params", got, run_torch(clipped_adamw, params, 50), 1e-9)


def test_a_donated_chain_runs_the_last_parts_kernel_in_its_buffers():
    last, called = optim.adamw(0.02), []

    def heard(*given):
        called.append(1)
        return last.fused(*given)

    recipe = optim.chain(optim.clip_by_norm(0.7), optim.Optimizer(last.init, last.update, heard))
    step = ft.step(ft.grad(net_loss), recipe, donate=True)
    state = step.init(net_params())
    kept = [leaf.data_ptr() for leaf in ft.tree.leaves((state.params, state.opt.inner["1"].first))]
    for count in range(3):
        state, _ = step(state, net_batch(4, count))
    assert [leaf.data_ptr() for leaf in ft.tree.leaves((state.params, state.opt.inner["1"].first))] == kept
    assert len(called) == 3


def test_chains_nest_and_a_part_may_be_there_twice():
    params, grads = net_params(0), net_params(1)
    half = optim.lookahead(optim.sgd(1.0), every=1, share=0.5)
    nested = optim.chain(optim.chain(half, optim.clip(0.3)), optim.chain(half))
    found, state = nested.update(grads, nested.init(params), params)
    expected = ft.tree.map(lambda g: -0.5 * (-0.5 * g).clamp(-0.3, 0.3), grads)
    equal("halved and turned twice", found, expected)
    assert sorted(state.inner) == ["0", "1"]
    same_bits("slow weights of its own", state.inner["1"].inner["0"].slow, ft.tree.map(torch.add, params, found))


def test_names_are_short_where_one_part_has_them():
    recipe = optim.chain(optim.clip_by_norm(1.0), optim.clip_adaptive(0.1), optim.adam(0.1))
    state = recipe.init(net_params())
    assert sorted(ft.hyper(state)) == ["1.eps", "2.eps", "b1", "b2", "lr", "norm", "ratio", "weight_decay"]
    state = ft.with_hyper(state, **{"1.eps": 0.5, "norm": 2.0})
    assert (state.inner["1"].hyper["eps"].item(), state.inner["2"].hyper["eps"].item()) == (0.5, 1e-8)
    outer = optim.plateau(optim.adam(0.1)).init(net_params())
    assert ft.hyper(outer)["optimizer.eps"].item() == ft.hyper(outer)["eps"].item() == 1e-8
    assert ft.with_hyper(outer, eps=0.5).inner["optimizer"].hyper["eps"].item() == 1e-8
    lines = str(ft.explain(recipe)).splitlines()
    assert [line.split()[-1] for line in lines if "─" in line] == ["clip_by_norm", "clip_adaptive", "adam"]


def test_a_pair_of_functions_from_elsewhere_is_a_part():
    class Halved:
        def init(self, params):
            return {"count": torch.zeros(())}

        def update(self, grads, state, params):
            return ft.tree.map(lambda leaf: leaf / 2, grads), {"count": state["count"] + 1}

    recipe = optim.chain(Halved(), optim.noise(0.0), optim.sgd(1.0))
    step = ft.step(ft.grad(net_loss), recipe, donate=True)
    state, batch = step.init(net_params()), net_batch(3)
    grads = ft.grad(net_loss).finished(net_params(), batch).grads
    state, _ = step(state, batch)
    equal("params", state.params, ft.tree.map(lambda p, g: p - g / 2, net_params(), grads))
    assert state.opt.inner["0"]["count"].item() == 1


def everything(rate):
    rule = optim.partition({"w": optim.adamw(rate), "others": optim.sgd(0.05, momentum=0.9)}, {"*w": "w", "*": "others"})
    ran = optim.lookahead(optim.plateau(optim.freeze(rule, "scale"), 0.5, 0, mode="max"), every=2)
    before = (optim.centralise(), optim.clip_adaptive(0.5), optim.noise(1e-3), optim.decay(0.01, "*w"), optim.clip_by_norm(1.0))
    return optim.skip_nonfinite(optim.chain(*before, ran))


def test_all_of_them_together_obey_the_laws_of_optimizers():
    check_optimizer(everything(optim.cosine(0.05, 9)), net_params(0, torch.float64), steps=4)
    step = ft.step(ft.grad(net_loss), everything(0.05))
    check_step(step, net_params(), [net_batch(3, place) for place in range(3)])
    members = [step.init(net_params(seed, torch.float64), seed=seed) for seed in range(2)]
    together = ft.population(step)
    states = together.init(members)
    for place in range(3):
        batch = net_batch(4, place, torch.float64)
        states, _ = together(states, batch)
        members = [step(member, batch)[0] for member in members]
    equal("members", ft.tree.unstack(states), members)


def test_a_small_recipe_is_the_same_compiled():
    def loss(params, batch):
        return (batch @ params["w"] - params["b"]).square()

    rule = optim.partition({"w": optim.adamw(optim.cosine(0.1, 9)), "others": optim.sgd(0.05)}, {"w": "w", "*": "others"})
    recipe = optim.chain(optim.clip_by_norm(1.0), optim.lookahead(optim.plateau(rule, 0.5, 0, mode="max"), every=2))
    step = ft.step(ft.grad(loss), optim.skip_nonfinite(recipe))
    params = {"w": torch.ones(3, dtype=torch.float64), "b": torch.ones((), dtype=torch.float64)}
    once, state, expected = ft.compiled(step), step.init(params), step.init(params)
    for place in range(6):
        batch = ft.random.normal(ft.random.key(place), (4, 3), torch.float64)
        batch[0, 0] = torch.nan if place == 3 else 1.0
        state, metrics = once(state, batch)
        expected, measured = step(expected, batch)
        equal("compiled", (state, metrics), (expected, measured))
    assert state.opt.skipped.item() == 1
    assert metrics["scale"].item() < 1
    assert "1 shapes" in ft.explain(once).facts["traced for"]


def test_refusals():
    with pytest.raises(ft.ArgumentError, match="chain needs at least one part"):
        optim.chain()
    rows = {"function adamw": optim.adamw, "float": 0.1, "list": [optim.sgd(0.1)], "NoneType": None}
    for got, wrong in rows.items():
        with pytest.raises(ft.ArgumentError, match=f"chain: part 1 is no optimizer, got {got}"):
            optim.chain(optim.clip(1.0), wrong)
    recipe, params = optim.chain(optim.clip(1.0), optim.adam(0.1)), net_params()
    with pytest.raises(ft.TreeError, match="expected the ChainState"):
        recipe.update(params, optim.adam(0.1).init(params), params)
    with pytest.raises(ft.TreeError, match="expected the states of 2 parts, got 1"):
        recipe.update(params, optim.chain(optim.clip(1.0)).init(params), params)
    with pytest.raises(ft.TreeError, match="structure"):
        recipe.update(bowl(params, 0), recipe.init({"w": torch.ones(2)}), params)
    with pytest.raises(ft.TreeError, match="real floating params"):
        recipe.init({"z": torch.zeros(1, dtype=torch.complex64)})
