"""unroll: n steps as one function, its derivatives those that finite differences find, its memory √n."""

from __future__ import annotations

import pytest
import torch
from allocated import peak
from instances import OPTIMIZERS, keyed_loss, net, net_batch, net_loss, net_params, plain_loss, random_tree

import functrain as ft
from functrain.testing import equal, same_bits

func = torch.func
STEPS = 5


def carrying_loss(params, batch, *, carry):
    """A loss whose carry has a derivative: a running mean of what the network gives."""
    found = net(params, batch["x"])
    mean = 0.9 * carry["mean"] + 0.1 * found.mean(0)
    return (found - 0.5 * mean - batch["targets"][0]).square().sum(1), {"mean": mean, "count": carry["count"] + 1}


def carrying_start():
    return {"mean": torch.full((2,), 0.3, dtype=torch.float64), "count": torch.tensor(0)}


ADAMW = ft.optim.adamw(0.02, b2=0.9, eps=1e-3)
STEPPED = {
    "sgd": ft.step(ft.grad(net_loss), ft.optim.sgd(0.03)),
    "sgd momentum": ft.step(ft.grad(net_loss), ft.optim.sgd(0.02, momentum=0.6, nesterov=True, weight_decay=0.1)),
    "adamw": ft.step(ft.grad(net_loss), ADAMW),
    "schedule": ft.step(ft.grad(net_loss), ft.optim.adam(ft.optim.cosine(0.02, 9, end=0.001), b2=0.9, eps=1e-3)),
    "keyed": ft.step(ft.grad(keyed_loss), ft.optim.sgd(0.03, momentum=0.5)),
    "carry": ft.step(ft.grad(carrying_loss), ft.optim.sgd(0.03)),
    "accumulated": ft.guard(ft.step(ft.accumulate(ft.grad(net_loss), 2), ADAMW)),
}


def stacked(steps=STEPS, dtype=torch.float64):
    return ft.tree.stack([net_batch(4, place, dtype) for place in range(steps)])


def start(name):
    """A state in the middle of a run, where no moment of Adam's is 0."""
    step = STEPPED[name]
    state = step.init(net_params(0, torch.float64), carry=carrying_start() if name == "carry" else None, seed=3)
    for batch in ft.tree.unstack(stacked(2)):
        state, _ = step(state, batch)
    return state


def floating(values):
    return {path: leaf for path, leaf in ft.named_params(values).items() if leaf.is_floating_point()}


def replaced(values, leaves):
    flat, spec = ft.tree.flatten(values)
    return ft.tree.unflatten(spec, [leaves.get(path, leaf) for path, leaf in zip(ft.tree.paths(values), flat)])


def problem(train, name, batches=None):
    """What a run ends with, as a function of every floating leaf of where it starts and of its batches, and those leaves."""
    whole = start(name), stacked() if batches is None else batches
    leaves = floating(whole)

    def value(leaves):
        state, metrics = train(*replaced(whole, leaves))
        return plain_loss(state.params, net_batch(3, 77, torch.float64)).mean() + metrics["loss"].mean()

    return value, leaves


def by_backward(value, leaves):
    mine = {path: leaf.clone().requires_grad_() for path, leaf in leaves.items()}
    result = value(mine)
    grads = torch.autograd.grad(result, list(mine.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(mine, grads)), result.detach()


def differences(value, leaves, along, step=1e-6):
    """The derivative of `value`, a tree of tensors, along a direction, by central differences."""
    ahead, behind = (value({path: leaf + sign * step * along[path] for path, leaf in leaves.items()}) for sign in (1, -1))
    return ft.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)


def direction(leaves, path):
    """Random in one leaf, zero in the others: relative to what is there, so that second moments stay above 0."""
    return {
        name: leaf * random_tree(tuple(leaf.shape), 5, leaf.dtype) if name == path else torch.zeros_like(leaf)
        for name, leaf in leaves.items()
    }


# --- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("name", STEPPED)
def test_unrolled_it_is_steps_in_a_loop(name, tracked, checkpoint):
    step = STEPPED[name]
    for count in (1, STEPS):
        train, batches = ft.unroll(step, count, checkpoint=checkpoint), stacked(count)
        first = ft.tree.map(lambda leaf: leaf.requires_grad_() if leaf.is_floating_point() and tracked else leaf, start(name))
        state, rows = first, []
        for batch in ft.tree.unstack(batches):
            state, metrics = step(state, batch)
            rows.append(metrics)
        got, measured = train(first, batches)
        same_bits(f"{count} steps", (got, measured), (state, ft.tree.stack(rows)))
        assert all(leaf.requires_grad for leaf in ft.tree.leaves(got.params)) == tracked
        assert got.key is first.key


# --- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPPED)
def test_derivatives_are_those_of_finite_differences(name):
    value, leaves = problem(ft.unroll(STEPPED[name], STEPS), name)
    grads, result = by_backward(value, leaves)
    equal("value", result, value(leaves))
    touched = {path for path, grad in grads.items() if grad.count_nonzero()}
    assert {"1.x", "0.params.hidden.w", "0.params.scale"} <= touched
    assert any(path.startswith("0.opt.hyper.lr") for path in touched)
    assert ("0.carry.mean" in touched) == (name == "carry") == ("1.weight" not in touched)
    for path in leaves:
        along = direction(leaves, path)
        slope = sum((grads[path] * along[path]).sum() for path in leaves)
        equal(path, slope, differences(value, leaves, along), 1e-7)


FIRST = {
    "backward": by_backward,
    "grad": lambda value, leaves: func.grad_and_value(value)(leaves),
    "vmap of grad": lambda value, leaves: func.vmap(func.grad_and_value(value))(
        {path: torch.stack([leaf, 1.01 * leaf]) for path, leaf in leaves.items()}
    ),
}
SECOND = {
    "backward of grad": lambda value, leaves: by_backward(steepness(value), leaves),
    "grad of grad": lambda value, leaves: func.grad_and_value(steepness(value))(leaves),
}


def steepness(value):
    return lambda leaves: sum(leaf.square().sum() for leaf in func.grad(value)(leaves).values())


def with_and_without(name, way):
    return [way(*problem(ft.unroll(STEPPED[name], STEPS, checkpoint=on), name)) for on in (True, False)]


@pytest.mark.parametrize("way", FIRST)
@pytest.mark.parametrize("name", ["sgd momentum", "schedule", "keyed", "carry"])
def test_checkpoints_change_no_bits_of_values_and_first_derivatives(name, way):
    same_bits(way, *with_and_without(name, FIRST[way]))


@pytest.mark.parametrize("way", SECOND)
def test_checkpoints_change_nothing_in_second_derivatives(way):
    equal(way, *with_and_without("carry", SECOND[way]))


def test_derivatives_agree_under_every_transform():
    value, leaves = problem(ft.unroll(STEPPED["schedule"], STEPS), "schedule")
    grads, result = by_backward(value, leaves)
    equal("grad", func.grad_and_value(value)(leaves), (grads, result))
    along = {path: leaf * random_tree(tuple(leaf.shape), 6, leaf.dtype) for path, leaf in leaves.items()}
    slope = sum((grads[path] * along[path]).sum() for path in leaves)
    equal("jvp", func.jvp(value, (leaves,), (along,)), (result, slope))
    turned = func.jvp(func.grad(value), (leaves,), (along,))[1]
    equal("Hessian times a vector", turned, differences(func.grad(value), leaves, along), 1e-5)


def test_hypergradients_of_many_rates_at_once():
    train = ft.unroll(STEPPED["sgd momentum"], STEPS)
    state = start("sgd momentum")

    def value(rate, momentum):
        end, _ = train(ft.with_hyper(state, lr=rate, momentum=momentum), stacked())
        return plain_loss(end.params, net_batch(3, 77, torch.float64)).mean()

    rates = torch.tensor([0.001, 0.01, 0.05], dtype=torch.float64)
    momenta = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    slopes = func.vmap(func.grad(value, argnums=(0, 1)))(rates, momenta)
    values = func.vmap(value)
    equal("rates", slopes[0], (values(rates + 1e-6, momenta) - values(rates - 1e-6, momenta)) / 2e-6, 1e-6)
    equal("momenta", slopes[1], (values(rates, momenta + 1e-6) - values(rates, momenta - 1e-6)) / 2e-6, 1e-6)
    curvature = func.vmap(func.grad(func.grad(value)))(rates, momenta)
    ahead, behind = (func.vmap(func.grad(value))(rates + shift, momenta) for shift in (1e-6, -1e-6))
    equal("second derivative", curvature, (ahead - behind) / 2e-6, 1e-5)


def test_a_line_in_closed_form():
    """Gradient descent on ½ w x²: x after n steps is x₀ Πₖ (1 − lr wₖ)."""
    train = ft.unroll(ft.step(ft.grad(lambda x, batch: (0.5 * x**2 * batch, batch / batch.detach())), ft.optim.sgd(0.1)), 3)

    def end(x, rate, curves):
        return train(ft.with_hyper(train.init(x), lr=rate), curves)[0].params

    x, rate, curves = (torch.tensor(number, dtype=torch.float64) for number in (2.0, 0.1, [[1.0], [2.0], [3.0]]))
    factors = 1 - rate * curves
    found = func.grad(end, argnums=(0, 1))(x, rate, curves)
    equal("x₀ and lr", found, (factors.prod(), -x * factors.prod() * (curves / factors).sum()))


# --- where derivatives get lost, or are no numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_weights_alone_are_differentiated(name):
    """No leaf of the state has a derivative: in the first step the gradients alone say that there is one."""
    value, leaves = problem(ft.unroll(STEPPED[name], 1, checkpoint=False), name, stacked(1))
    weight = leaves["1.weight"].clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaves | {"1.weight": weight}), weight)
    along = direction(leaves, "1.weight")
    equal("weights", (found * along["1.weight"]).sum(), differences(value, leaves, along), 1e-7)
    assert found.count_nonzero() == found.numel()


def rectified(params, batch):
    hidden = torch.relu(batch["x"] @ params["in"] + params["b"])
    return (hidden @ params["out"] - batch["targets"][0]).square().sum(1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradients_that_are_zero_leave_hypergradients_finite(name, checkpoint):
    """Two of four units never fire: their gradients are 0 from the first step on, and so are Adam's second moments."""
    params = random_tree({"in": (3, 4), "b": (4,), "out": (4, 2)}, 2, torch.float64)
    params["b"][:2] = -100.0
    train = ft.unroll(ft.step(ft.grad(rectified), OPTIMIZERS[name](0.01)), 3, checkpoint=checkpoint)
    batches = stacked(3)

    def value(leaves):
        rate, params = leaves["rate"], {name: leaf for name, leaf in leaves.items() if name != "rate"}
        state, _ = train(ft.with_hyper(train.init(params), lr=rate), batches)
        return rectified(state.params, net_batch(3, 77, torch.float64)).mean()

    leaves = {"rate": torch.tensor(0.01, dtype=torch.float64), **params}
    grads = func.grad(value)(leaves)
    assert not ft.grad(rectified)(params, net_batch(4, 0, torch.float64)).grads["in"][:, :2].any()
    for path in leaves:
        along = direction(leaves, path)
        equal(path, (grads[path] * along[path]).sum(), differences(value, leaves, along, 1e-7), 1e-5)


def test_initial_params_that_the_optimizer_keeps_for_itself():
    """Schedule-free's z begins as the params: their derivative has to flow through it, too."""
    train = ft.unroll(ft.step(ft.grad(plain_loss), ft.optim.schedule_free(0.05)), 3)
    leaves = floating(net_params(0, torch.float64))

    def value(leaves):
        state, _ = train(train.init(replaced(net_params(0, torch.float64), leaves)), stacked(3))
        return plain_loss(ft.optim.schedule_free_params(state, state.params), net_batch(3, 77, torch.float64)).mean()

    grads, _ = by_backward(value, leaves)
    for path in leaves:
        along = direction(leaves, path)
        equal(path, (grads[path] * along[path]).sum(), differences(value, leaves, along, 1e-7), 1e-5)


def test_init_keeps_derivatives_where_a_steps_own_cuts_them_off():
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    params = ft.tree.map(lambda leaf: leaf.requires_grad_(), net_params())
    kept, cut = ft.unroll(step, 2).init(params, seed=5), step.init(params, seed=5)
    assert all(leaf.requires_grad for leaf in ft.tree.leaves(kept.params))
    assert not any(leaf.requires_grad for leaf in ft.tree.leaves(cut))
    same_bits("the same state", kept, cut)
    assert func.grad(lambda x: step.init(x).params ** 2)(torch.tensor(3.0)) == 6.0


def test_a_loss_that_closes_over_what_is_differentiated_is_an_error_and_no_silent_zero():
    def value(scale, checkpoint):
        loss = lambda params, batch: (scale * params - batch) ** 2  # noqa: E731
        train = ft.unroll(ft.step(ft.grad(loss), ft.optim.sgd(0.1)), 3, checkpoint=checkpoint)
        return train(train.init(torch.tensor(1.0)), torch.ones(3, 2))[0].params

    with pytest.raises(ft.LossError, match=r"'scale'.*pass it as an argument"):
        func.grad(value)(torch.tensor(2.0), True)
    step = 1e-2
    expected = (value(torch.tensor(2.0 + step), True) - value(torch.tensor(2.0 - step), True)) / (2 * step)
    equal("without checkpoints", func.grad(value)(torch.tensor(2.0), False), expected, 1e-2)


# --- memory, graphs, refusals ------------------------------------------------------------------------------------------


def test_memory_grows_as_the_square_root():
    step = ft.step(ft.grad(lambda params, batch: torch.tanh(batch @ params)), ft.optim.sgd(0.01))
    params = random_tree((4,), 0)

    def bytes_of(steps, checkpoint, by):
        train, batches = ft.unroll(step, steps, checkpoint=checkpoint), random_tree((steps, 500, 4), 1)

        def value(rate):
            return train(ft.with_hyper(train.init(params), lr=rate), batches)[0].params.square().sum()

        return peak(lambda: by(value, torch.tensor(0.01)))

    def backward(value, rate):
        rate.requires_grad_()
        return torch.autograd.grad(value(rate), rate)

    (few, many), (few_kept, many_kept) = ([bytes_of(steps, on, backward) for steps in (16, 64)] for on in (True, False))
    assert many / few < 2.1
    assert many_kept / few_kept > 3.6
    assert many < many_kept / 6
    few, many = (bytes_of(steps, True, lambda value, rate: func.grad(value)(rate)) for steps in (4, 16))
    assert many / few < 2.5


def test_a_compiled_step_around_it_takes_the_same_steps():
    train = ft.unroll(ft.step(ft.grad(lambda x, batch: torch.sin(batch * x)), ft.optim.sgd(0.05)), 3)

    def meta_loss(learnt, batch, *, carry):
        state = ft.with_hyper(train.init(learnt["x"]), lr=learnt["rate"])
        return torch.cos(batch * train(state, carry)[0].params), carry

    meta = ft.step(ft.grad(meta_loss), ft.optim.sgd(0.01))
    learnt = {"x": torch.tensor(1.5), "rate": torch.tensor(0.05)}
    state, batch = meta.init(learnt, carry=random_tree((3, 4), 1)), random_tree((5,), 2)
    expected, _ = meta(state, batch)
    got, _ = ft.compiled(meta, donate=False)(state, batch)
    equal("compiled", got.params, expected.params, 1e-6)
    assert all(abs(expected.params[name] - learnt[name]) > 1e-4 for name in learnt)


def test_what_unroll_refuses():
    pure = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    for step, kind in (
        (ft.step(ft.grad(net_loss), ft.optim.sgd(0.1), donate=True), "donating"),
        (ft.compiled(pure), "compiled"),
        (ft.repeat(ft.compiled(pure, donate=False), 2), "compiled"),
    ):
        with pytest.raises(ft.ArgumentError, match=f"through a {kind} step: unroll the pure step inside, and compile outside"):
            ft.unroll(step, 3)
    with pytest.raises(ft.ArgumentError, match="unroll takes a step"):
        ft.unroll(net_loss, 3)
    for steps in (0, -1, True, 2.0):
        with pytest.raises(ft.ArgumentError, match="at least 1"):
            ft.unroll(pure, steps)
    for tracked in (True, False):
        state = pure.init(net_params())
        state.params["scale"].requires_grad_(tracked)
        with pytest.raises(ft.ArgumentError, match="takes 3 batches stacked, got 2"):
            ft.unroll(pure, 3)(state, stacked(2, torch.float32))


def test_it_explains_itself():
    pure = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    assert "the states before 4 segments" in str(ft.explain(ft.unroll(pure, 16)))
    assert "all intermediate values" in str(ft.explain(ft.unroll(pure, 16, checkpoint=False)))
    assert ft.unroll(pure, 2).remade(ft.grad(keyed_loss)).grad.uses == {"key"}
