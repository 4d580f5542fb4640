"""Partition and freeze follow torch's parameter groups; masked acts on what it selects; labels have to fit."""

from __future__ import annotations

import pytest
import torch
from instances import keyed_loss, net_batch, net_params
from updating import run, run_torch

import functrain as ft
from functrain.core import optim
from functrain.testing import check_optimizer, check_step, equal, same_bits

# The paths of net_params are hidden.b, hidden.w, out.0, out.1, scale.
WEIGHTS = {"*w": "decayed", "out.0": "decayed", "*": "plain"}
TREE = {"hidden": {"w": "decayed", "b": "plain"}, "out": ("decayed", "plain"), "scale": "plain"}
FORMS = {"globs": WEIGHTS, "function": lambda path: "decayed" if path in ("hidden.w", "out.0") else "plain", "tree": TREE}


def split(labels=WEIGHTS, rate=0.01):
    return optim.partition({"decayed": optim.adamw(rate, weight_decay=0.3), "plain": optim.sgd(0.1, momentum=0.9)}, labels)


def groups(leaves):
    """The weights among the leaves in flattening order, and the others."""
    return [leaves[1], leaves[2]], [leaves[0], leaves[3], leaves[4]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_two_optimizers_follow_torchs_two(form, fused):
    params = net_params(0, torch.float64)

    def both(leaves):
        weights, others = groups(leaves)
        pair = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3), torch.optim.SGD(others, lr=0.1, momentum=0.9)
        return lambda count: [other.step() for other in pair]

    got, _ = run(split(FORMS[form]), params, 50, fused=fused)
    equal("params", got, run_torch(both, params, 50), 1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_one_optimizer_twice_follows_torchs_param_groups(fused):
    params = net_params(1, torch.float64)

    def grouped(leaves):
        weights, others = groups(leaves)
        other = torch.optim.AdamW([{"params": weights}, {"params": others, "lr": 0.05, "weight_decay": 0.0}], lr=0.01)
        return lambda count: other.step()

    both = {"decayed": optim.adamw(0.01), "plain": optim.adamw(0.05, weight_decay=0.0)}
    got, _ = run(optim.partition(both, WEIGHTS), params, 50, fused=fused)
    equal("params", got, run_torch(grouped, params, 50), 1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["hidden.*", ["hidden.w", "*.b"], lambda path: path.startswith("hidden")])
def test_frozen_leaves_stay_and_the_others_follow_torch(where, fused):
    params = net_params(0, torch.float64)

    def some(leaves):
        other = torch.optim.AdamW(leaves[2:], lr=0.02)
        return lambda count: other.step()

    optimizer = optim.freeze(optim.adamw(0.02), where)
    got, state = run(optimizer, params, 50, fused=fused)
    equal("params", got, run_torch(some, params, 50), 1e-9)
    same_bits("frozen", got[-1]["hidden"], params["hidden"])
    assert sorted(ft.tree.paths(state.inner["trained"].first)) == ["out.0", "out.1", "scale"]


def test_masked_acts_on_what_it_selects_and_passes_on_the_rest():
    params, grads = net_params(0), net_params(1)
    part = optim.masked(optim.clip(0.01), ["*w", "scale"])
    found, _ = part.update(grads, part.init(params), params)
    for path, leaf in ft.tree.named(found).items():
        grad = ft.tree.named(grads)[path]
        same_bits(path, leaf, grad.clamp(-0.01, 0.01) if path in ("hidden.w", "scale") else grad)
    everything = optim.masked(optim.clip(0.01), "*")
    clipped = ft.tree.map(lambda g: g.clamp(-0.01, 0.01), grads)
    same_bits("all", everything.update(grads, everything.init(params), params)[0], clipped)


def test_what_a_norm_sees_depends_on_the_order():
    params, grads = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clip, sgd = optim.clip_by_norm(1.0), optim.sgd(1.0)
    rows = {
        "within": (optim.freeze(optim.chain(clip, sgd), "a"), -1.0),
        "before": (optim.chain(clip, optim.freeze(sgd, "a")), -0.8),
        "group": (optim.partition({"x": optim.chain(clip, sgd), "y": sgd}, {"a": "y", "b": "x"}), -1.0),
    }
    for name, (optimizer, expected) in rows.items():
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert updates["b"].item() == pytest.approx(expected, abs=1e-5), name


TWO = {"x": optim.adamw(optim.cosine(0.1, 9)), "y": optim.chain(optim.noise(0.1), optim.sgd(0.1))}
MADE = {
    "partition": optim.partition(TWO, {"*w": "x", "*": "y"}),
    "freeze": optim.freeze(optim.adamw(0.1), "*w"),
    "masked": optim.masked(optim.adamw(0.1), lambda path: path.endswith("w")),
}


@pytest.mark.parametrize("optimizer", MADE.values(), ids=MADE)
def test_they_obey_the_laws_of_optimizers(optimizer):
    check_optimizer(optimizer, steps=3)
    check_optimizer(optimizer, net_params(0, torch.bfloat16), steps=2, transforms=False)


def test_hyperparameters_are_told_apart_by_label():
    optimizer = split(rate=optim.cosine(0.02, 9))
    state = optimizer.init(net_params())
    assert sorted(ft.hyper(state)) == ["b1", "b2", "decayed.lr", "eps", "momentum", "plain.lr", "weight_decay"]
    other = ft.with_hyper(state, **{"plain.lr": 0.5, "decayed.lr_peak": 0.25, "b1": 0.5})
    assert other.inner["plain"].hyper["lr"].item() == 0.5
    assert other.inner["decayed"].hyper["lr"]["peak"].item() == 0.25
    with pytest.raises(ft.ArgumentError, match=r"no hyperparameter 'lr': expected one of .*'plain\.lr'"):
        ft.with_hyper(state, lr=0.5)
    step = ft.step(ft.grad(keyed_loss), optimizer)
    _, metrics = step(step.init(net_params()), net_batch(3))
    assert metrics["decayed.lr"].item() == 0.02


@pytest.mark.parametrize("donate", [False, True])
def test_a_partitioned_step_resumes(donate):
    step = ft.step(ft.grad(keyed_loss), optim.freeze(split(), "scale"), donate=donate)
    check_step(step, net_params(), [net_batch(3, place) for place in range(3)])


def test_members_of_a_population_have_their_own_rates():
    step = ft.step(ft.grad(keyed_loss), split())
    members = [ft.with_hyper(step.init(net_params(seed), seed=seed), **{"plain.lr": 0.1 * (1 + seed)}) for seed in range(2)]
    together = ft.population(step)
    states, _ = together(together.init(members), net_batch(4))
    for member, state in zip(members, ft.tree.unstack(states)):
        equal("member", state, step(member, net_batch(4))[0])


def test_a_donated_partition_stays_in_its_buffers():
    step = ft.step(ft.grad(keyed_loss), optim.chain(optim.clip_by_norm(1.0), split()), donate=True)
    state = step.init(net_params())
    kept = [leaf.data_ptr() for leaf in ft.tree.leaves((state.params, state.opt.inner["1"].inner["decayed"].second))]
    state, _ = step(state, net_batch(4))
    same = [leaf.data_ptr() for leaf in ft.tree.leaves((state.params, state.opt.inner["1"].inner["decayed"].second))]
    assert kept == same
    assert "in place" in ft.explain(step).facts["update"]
    assert "decayed: adamw" in str(ft.explain(step))


def test_a_part_that_is_not_fused_does_not_hold_the_others_back():
    decayed = optim.chain(optim.adam(0.01), optim.decay(0.003, decoupled=True))
    assert decayed.fused is None
    optimizer = optim.partition({"decayed": decayed, "plain": optim.sgd(0.1, momentum=0.9)}, WEIGHTS)
    params = net_params(0, torch.float64)
    equal("fused", run(optimizer, params, 5, fused=True)[0], run(split(), params, 5)[0], 1e-9)


def test_one_bare_tensor_has_the_empty_path():
    for labels in ("all", {"*": "all"}, {"": "all"}, lambda path: "all"):
        optimizer = optim.partition({"all": optim.sgd(1.0)}, labels)
        updates, _ = optimizer.update(torch.ones(2), optimizer.init(torch.ones(2)), torch.ones(2))
        same_bits("bare", updates, -torch.ones(2))


# --- refusals -----------------------------------------------------------------------------------------------------

SGD = {"a": optim.sgd(0.1), "b": optim.sgd(0.2)}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"*w": "a", "scale": "b"}, r"no pattern matches 'hidden\.b', 'out\.0', 'out\.1'; end with '\*'"),
        ({"*.weight": "a", "*": "b"}, r"'\*\.weight' matches no path of params; paths are 'hidden\.b'"),
        ({"*": "a", "*w": "b"}, r"'\*w' matches only paths that patterns before it have taken"),
        ({"*w": "a", "*": "c"}, r"no optimizer for the label 'c' of 'hidden\.b'.*labels are 'a', 'b'"),
        ({"*": "a"}, "no path of params has the label 'b'"),
        (lambda path: "a", "no path of params has the label 'b'"),
        (lambda path: None, r"no optimizer for the label None of 'hidden\.b'"),
        (lambda path: ["a"], r"no optimizer for the label \['a'\]"),
        ({"hidden": {"w": "a", "b": "b"}}, "another structure: missing"),
        ({**TREE, "scale": 3}, "no optimizer for the label .*3 of 'scale'"),
    ],
)
def test_labels_have_to_fit(labels, message):
    with pytest.raises(ft.TreeError, match=message):
        optim.partition(SGD, labels).init(net_params())


def test_other_refusals():
    for wrong in ({}, [optim.sgd(0.1)], None):
        with pytest.raises(ft.ArgumentError, match=r"partition takes \{label: optimizer\}"):
            optim.partition(wrong, {"*": "a"})
    with pytest.raises(ft.ArgumentError, match="labels is empty"):
        optim.partition(SGD, {})
    for label in ("", 1):
        with pytest.raises(ft.ArgumentError, match="labels are strings"):
            optim.partition({label: optim.sgd(0.1)}, {"*": label})
    with pytest.raises(ft.ArgumentError, match="partition: optimizer 'b' is no optimizer, got function adamw"):
        optim.partition({"a": optim.sgd(0.1), "b": optim.adamw}, {"*": "a"})
    for make in (optim.freeze, optim.masked):
        with pytest.raises(ft.ArgumentError, match="is no optimizer, got function sgd"):
            make(optim.sgd, "*")
        for where in (None, (), 3):
            with pytest.raises(ft.ArgumentError, match="where is a glob"):
                make(optim.sgd(0.1), where)
        with pytest.raises(ft.TreeError, match=r"'\*\.wieght' matches no path"):
            make(optim.sgd(0.1), ["*w", "*.wieght"]).init(net_params())
        with pytest.raises(ft.TreeError, match="selects no path of params"):
            make(optim.sgd(0.1), lambda path: False).init(net_params())


def test_other_params_than_at_init_are_told():
    optimizer = split()
    state, params = optimizer.init(net_params()), net_params()
    with pytest.raises(ft.TreeError, match="grads do not have the structure of params"):
        optimizer.update(params, state, {**params, "more": torch.ones(1)})
    more = {**params, "more": torch.ones(1)}
    for way in (optimizer.update, optimizer.fused):
        with pytest.raises(ft.TreeError, match="'more'"):
            way(more, state, more)
    with pytest.raises(ft.TreeError, match="expected the PartitionState"):
        optimizer.update(params, optim.sgd(0.1).init(params), params)
    with pytest.raises(ft.TreeError, match="made by another init"):
        optimizer.update(params, optim.freeze(optim.adamw(0.1), "scale").init(params), params)
