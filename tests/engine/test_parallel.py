"""parallel: plans, workers, and that nothing of them is left behind."""

from __future__ import annotations

import threading
import traceback

import pytest
import torch
from instances import carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params

import functrain as ft
from functrain.engine.workers import run_in_order
from functrain.testing import equal


def seen_threads():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), found[0]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("how", "exact"), [("threads", False), ("threads", True), ("loop", True), ("auto", True)])
def test_thread_settings_are_put_back(how, exact, threads):
    torch.set_num_threads(threads)
    before = threading.active_count(), seen_threads()
    inside = []

    def loss(params, batch):
        inside.append((threading.current_thread().name, torch.get_num_threads()))
        return net_loss(params, batch)

    ft.parallel(ft.grad(loss), 4, how=how, workers=2, exact=exact)(net_params(), net_batch(8))
    assert (threading.active_count(), seen_threads()) == before
    assert len(inside) == 4
    assert all(count == (1 if exact else max(1, threads // 2)) for _, count in inside)
    on_workers = how == "threads" or (how == "auto" and exact)
    assert all(name.startswith("functrain-part") == on_workers for name, _ in inside)


class UnluckyError(Exception):
    pass


@pytest.mark.parametrize("how", ["threads", "loop", "vmap"])
def test_a_workers_error_is_the_losss_own(how):
    def loss(params, batch):
        losses = net_loss(params, batch)
        if how == "vmap" or (batch["x"] == 0).all():
            raise UnluckyError("this part")
        return losses

    batch = net_batch(8)
    batch["x"][4:6] = 0
    torch.set_num_threads(2)
    before = threading.active_count(), seen_threads()
    with pytest.raises(UnluckyError, match="this part") as raised:
        ft.parallel(ft.grad(loss), 4, how=how, workers=2)(net_params(), batch)
    assert "loss" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert (threading.active_count(), seen_threads()) == before


def test_an_error_stops_the_parts_that_have_not_begun():
    begun = []
    both = threading.Barrier(2)

    def work(item):
        begun.append(item)
        if item < 2:
            both.wait()
        if item == 0:
            raise UnluckyError
        # Work that leaves the interpreter, so that the caller can wake up: all thousand would take seconds.
        return torch.linalg.matrix_power(torch.eye(128), 1 << 20).trace()

    with pytest.raises(UnluckyError):
        list(run_in_order(work, range(1000), 2, 1))
    assert len(begun) <= 4


def test_grad_mode_and_autocast_reach_the_workers():
    modes = []

    def loss(params, batch):
        modes.append((torch.is_autocast_enabled("cpu"), (batch["x"] @ params["hidden"]["w"]).dtype))
        return net_loss(params, batch)

    grad = ft.parallel(ft.grad(loss), 2, how="threads", workers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad(net_params(), net_batch(4))
    grad(net_params(), net_batch(4))
    assert modes == [(True, torch.bfloat16)] * 2 + [(False, torch.float32)] * 2
    assert list(run_in_order(lambda _: torch.is_grad_enabled(), [0, 1], 2, 1)) == [True, True]
    with torch.no_grad():
        assert list(run_in_order(lambda _: torch.is_grad_enabled(), [0, 1], 2, 1)) == [False, False]


@pytest.mark.parametrize("how", ["threads", "loop", "vmap", "fused"])
def test_every_plan_nests_under_transforms(how):
    params, batch, key = net_params(0, torch.float64), net_batch(5, 0, torch.float64), ft.random.key(1)
    leaves, spec = ft.tree.flatten(params)
    grad = ft.parallel(ft.grad(keyed_loss), 2, how=how, workers=2)

    def loss(*leaves):
        return grad(ft.tree.unflatten(spec, leaves), batch, key=key).loss

    outer = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    # A thread would lose the surrounding transform, and its gradient would silently be zero.
    equal("func.grad", ft.tree.unflatten(spec, list(outer)), grad(params, batch, key=key).grads)
    stacked = [torch.stack([leaf, 2 * leaf]) for leaf in leaves]
    equal("vmap", torch.func.vmap(loss)(*stacked)[1], loss(*[2 * leaf for leaf in leaves]))


def test_threads_track_params_that_require_gradients():
    params, batch = net_params(0, torch.float64), net_batch(6, 0, torch.float64)
    sums = []
    for how in ("loop", "threads"):
        tracked = ft.tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
        taken = ft.parallel(ft.grad(net_loss), 3, how=how, workers=2)(tracked, batch)
        sum(leaf.square().sum() for leaf in ft.tree.leaves(taken.grads)).backward()
        sums.append(ft.tree.map(lambda leaf: leaf.grad, tracked))
    equal("second order", sums[1], sums[0])


@pytest.mark.parametrize(
    ("make", "how", "reason"),
    [
        (lambda g: ft.parallel(g, 8), "fused", "linear"),
        (lambda g: ft.parallel(g, 1), "loop", "one part"),
        (lambda g: ft.parallel(g, 8, exact=True, workers=2), "threads", "bits of the tree"),
        (lambda g: ft.parallel(g, 8, exact=True, workers=1), "loop", "one worker"),
        (lambda g: ft.parallel(ft.grad(carried_loss), 8, workers=2), "threads", "shared buffers"),
        (lambda g: ft.parallel(g, 8, how="vmap"), "vmap", "asked for"),
        (lambda g: ft.accumulate(g, 4), "loop", "asked for"),
    ],
)
def test_explain_says_which_plan_and_why(make, how, reason):
    facts = ft.explain(make(ft.grad(net_loss))).facts
    assert facts["plan"].startswith(how)
    assert reason in facts["plan"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: ft.parallel(g, 0), "parts must be an int of at least 1, got 0"),
        (lambda g: ft.parallel(g, 2.0), "parts must be an int of at least 1, got 2.0"),
        (lambda g: ft.parallel(g, True), "parts must be an int"),
        (lambda g: ft.parallel(g, 2, torch.mean), "reduce must be a Reducer such as ft.reduce.mean"),
        (lambda g: ft.parallel(g, 2, workers=0), "workers must be an int of at least 1, got 0"),
        (lambda g: ft.parallel(g, 2, how="fast"), "how must be one of auto, fused, vmap, threads, loop, got 'fast'"),
        (lambda g: ft.parallel(g, 2, how="fused", exact=True), "how='fused' is not possible here, exact=True"),
        (lambda g: ft.parallel(g, 2, how="vmap", exact=True), "exact=True needs threads, loop or auto"),
        (lambda g: ft.parallel(ft.grad(carried_loss), 2, how="fused"), "not possible here, the loss threads shared buffers"),
        (lambda g: ft.parallel(net_loss, 2), r"expected a gradient.*write ft.grad\(loss\)"),
        (lambda g: ft.accumulate(g, 0), "parts must be"),
    ],
)
def test_what_parallel_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make(ft.grad(net_loss))


def test_a_shared_carry_is_averaged_by_examples():
    params, batch = net_params(), net_batch(7)
    result = ft.parallel(ft.grad(carried_loss), 2, how="loop")(params, batch, carry=carried_start())
    equal("mean", result.carry["mean"], 0.1 * batch["x"].mean(0))
    assert result.carry["count"] == 1
