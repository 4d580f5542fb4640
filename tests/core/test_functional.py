"""functional: a module as a function, pure in any mode and any number of threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import Recurrent, random_tree
from torch import nn

import functrain as ft
from functrain.testing import equal, same_bits


class Tied(nn.Module):
    """Two layers with one weight, a layer that stands in two places, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.third
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.register_parameter("nothing", None)

    def forward(self, x, *, scale=1.0):
        return scale * self.again(torch.tanh(self.third(self.second(torch.tanh(self.first(x)))))) + self.shift


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    module, x = Tied(), torch.randn(5, 4)
    params, apply = ft.functional(module)
    assert sorted(params) == sorted(dict(module.named_parameters()))
    same_bits("forward", apply(params, x, scale=2.0), module(x, scale=2.0).detach())
    module(x).square().sum().backward()
    taken = ft.grad(lambda params, x: apply(params, x).square().sum(1))(params, x)
    equal("grads", taken.grads, {name: value.grad for name, value in module.named_parameters()})


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 3),
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten()),
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval(),
    ],
    ids=["linear", "norm", "conv", "transformer", "batch norm in eval"],
)
def test_gradients_are_the_modules_own_and_the_module_is_untouched(make):
    torch.manual_seed(1)
    module, x = make(), torch.randn(5, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    params, apply = ft.functional(module)
    taken = ft.grad(lambda params, x: apply(params, x).square().flatten(1).sum(1))(params, x)
    assert all(value.grad is None for value in module.parameters())
    same_bits("module", dict(module.state_dict()), before)
    module(x).square().sum().backward()
    equal("grads", taken.grads, {name: value.grad for name, value in module.named_parameters()})


def test_params_are_copies():
    module = nn.Linear(2, 2)
    params, apply = ft.functional(module)
    expected = apply(params, torch.ones(1, 2))
    with torch.no_grad():
        module.weight.add_(1)
    same_bits("the module moved on", apply(params, torch.ones(1, 2)), expected)
    assert not any(value.requires_grad for value in params.values())


def test_lstm_gradients_are_autograds():
    torch.manual_seed(2)
    module, x = Recurrent(), torch.randn(4, 7, 3)
    state = (torch.randn(1, 4, 5), torch.randn(1, 4, 5))
    params, apply = ft.functional(module)

    def loss(params, batch):
        y, _ = apply(params, batch["x"], (batch["h"][None], batch["c"][None]))
        return y.square().sum((1, 2))

    batch = {"x": x, "h": state[0][0], "c": state[1][0]}
    module(x, state)[0].square().sum().backward()
    expected = {name: value.grad for name, value in module.named_parameters()}
    equal("autograd", ft.grad(loss)(params, batch).grads, expected)
    under = torch.func.grad(lambda params: ft.grad(loss)(params, batch).loss)(params)
    equal("under func.grad", under, expected)


# --- buffers and modes --------------------------------------------------------------------------------------------


def norm_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def norm_loss(apply):
    def loss(params, x, *, carry):
        y, carry = apply(params, x, carry=carry)
        return y.square().sum(1), carry

    return loss


def test_batch_norm_buffers_are_the_modules_own_after_three_batches():
    module = norm_net()
    params, apply = ft.functional(module)
    carry = ft.states(apply)
    start = ft.tree.map(torch.clone, carry)
    for place in range(3):
        x = random_tree((6, 3), place)
        module(x)
        taken = ft.grad(norm_loss(apply))(params, x, carry=carry)
        carry = taken.carry
    same_bits("buffers", carry, dict(module.named_buffers()))
    same_bits("what apply came with", apply.buffers, start)
    x = random_tree((4, 3), 9)
    out, after = apply.eval()(params, x, carry=carry)
    equal("eval with a carry", out, module.eval()(x).detach())
    same_bits("eval leaves buffers", after, carry)


@pytest.mark.parametrize("parts", [1, 3])
def test_batch_norm_in_parts_agrees_among_plans(parts):
    params, apply = ft.functional(norm_net())
    x = random_tree((8, 3), 0)
    results = [
        ft.parallel(ft.grad(norm_loss(apply)), parts, how=how, workers=2).finished(params, x, carry=apply.buffers)
        for how in ("loop", "threads", "vmap", "auto")
    ]
    for result in results[1:]:
        equal("plans", result, results[0])
    assert results[0].carry["1.num_batches_tracked"] == 1
    # Running means are averaged, weighted by examples: that of the batch, whatever the parts.
    mean = ft.functional(norm_net())[1](params, x, carry=apply.buffers)[1]["1.running_mean"]
    equal("running mean", results[0].carry["1.running_mean"], mean)
    assert "shared buffers" in str(ft.explain(ft.parallel(ft.grad(norm_loss(apply)), 3)))


def test_modes_are_chosen_and_never_switched():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Dropout(0.5).eval())
    params, apply = ft.functional(module)
    x, key = torch.ones(64, 3), ft.random.key(0)
    plain = apply.eval()(params, x)
    same_bits("eval is plain", plain, apply.eval()(params, x, key=key))
    # As the module was: the second dropout is frozen.
    share = (apply(params, x, key=key) == 0).double().mean()
    assert 0.3 < share < 0.7
    both = (apply.train()(params, x, key=key) == 0).double().mean()
    assert 0.6 < both < 0.9
    assert [child.training for child in module] == [True, True, False]
    same_bits("and again", apply.eval()(params, x), plain)
    with pytest.raises(ft.LossError, match="dropout '1' has no randomness: declare `key`"):
        apply(params, x)


def test_a_module_that_writes_buffers_in_its_own_way_needs_a_carry():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0.0))

        def forward(self, x):
            self.calls.add_(1)
            return x + self.calls

    params, apply = ft.functional(Counter())
    out, carry = apply(params, torch.zeros(2), carry=apply.buffers)
    assert out.tolist() == [1.0, 1.0]
    assert carry["calls"] == 1
    assert apply.buffers["calls"] == 0
    with pytest.raises(ft.LossError, match="changes its buffers 'calls'"):
        apply(params, torch.zeros(2))


def test_what_functional_refuses():
    with pytest.raises(ft.ArgumentError, match=r"takes an nn.Module, got function"):
        ft.functional(lambda x: x)
    with pytest.raises(ft.ArgumentError, match=r"'weight'.*not initialised"):
        ft.functional(nn.LazyLinear(2))
    params, apply = ft.functional(norm_net())
    with pytest.raises(ft.LossError, match=r"updates its buffers when training \('1.running_mean' …\).*carry=apply.buffers"):
        apply(params, torch.ones(2, 3))
    with pytest.raises(ft.TreeError, match=r"missing '0.bias'; unexpected 'other'"):
        apply({("other" if name == "0.bias" else name): leaf for name, leaf in params.items()}, torch.ones(2, 3), carry={})
    with pytest.raises(ft.TreeError, match=r"carry does not fit.*missing '1.running_mean'"):
        apply(params, torch.ones(2, 3), carry={})
    for module in (nn.MultiheadAttention(4, 2, dropout=0.1), nn.LSTM(2, 2, 2, dropout=0.5), nn.AlphaDropout(0.5)):
        params, apply = ft.functional(module)
        with pytest.raises(ft.ArgumentError, match=r"global generator.*apply.eval\(\)"):
            apply(params, torch.ones(1, 2, 2))
    params, apply = ft.functional(nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True))
    assert apply.eval()(params, *[torch.ones(2, 3, 4)] * 3)[0].shape == (2, 3, 4)


# --- threads ------------------------------------------------------------------------------------------------------


def test_eight_threads_share_one_apply_and_none_of_10_000_gradients_is_wrong():
    torch.manual_seed(4)
    _, apply = ft.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    grad = ft.grad(lambda params, x: apply(params, x).square().sum(1))
    x, threads, calls = random_tree((5, 3), 0), 8, 1250
    mine = [ft.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))[0] for _ in range(threads)]
    expected = [ft.tree.leaves(grad(params, x)) for params in mine]
    wrong, done, gate = [0] * threads, [0] * threads, threading.Barrier(threads)

    def work(place):
        torch.set_num_threads(1)
        gate.wait()
        for _ in range(calls):
            taken = ft.tree.leaves(grad(mine[place], x))
            wrong[place] += not all(map(torch.equal, taken, expected[place]))
            done[place] += 1

    workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (sum(done), sum(wrong)) == (10_000, 0)


@settings(max_examples=10)
@given(size=st.integers(1, 5), times=st.integers(1, 4))
def test_dropout_served_by_key_does_not_depend_on_mates(size, times):
    torch.manual_seed(5)
    params, apply = ft.functional(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    keys, x = ft.random.split(ft.random.key(0), size), random_tree((size, times, 3), 1)
    whole = apply(params, x, key=keys)
    for place in range(size):
        equal("alone", apply(params, x[place : place + 1], key=keys[place : place + 1]), whole[place : place + 1])
