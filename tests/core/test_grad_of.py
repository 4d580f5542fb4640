"""The gradient of one entry of the params, against torch.autograd over a loss whose other params are detached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import PLANS, carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params, recurrent
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.core.entries import entry
from functrain.core.examples.gradients import plan_of, scaled_sum
from functrain.testing import check_grad, equal, same_bits

F64 = torch.float64
ENTRIES: dict[Any, Callable[[Any], Any]] = {
    "hidden": lambda params: params["hidden"],
    "hidden.w": lambda params: params["hidden"]["w"],
    "out": lambda params: params["out"],
    "out.1": lambda params: params["out"][1],
    "scale": lambda params: params["scale"],
    ("scale", "hidden"): lambda params: {"scale": params["scale"], "hidden": params["hidden"]},
    ("out.0", "hidden.b"): lambda params: {"out.0": params["out"][0], "hidden.b": params["hidden"]["b"]},
}


def by_hand(params: Any, batch: Any, of: Any) -> Any:
    """Σᵢ wᵢ ∇lossᵢ for an entry alone: all other leaves are detached."""
    copies = ft.tree.map(lambda leaf: leaf.detach().clone(), params)
    flat, spec = ft.tree.flatten(ENTRIES[of](copies))
    for leaf in flat:
        leaf.requires_grad_()
    losses = net_loss(copies, batch)
    taken = torch.autograd.grad((losses.losses * losses.weights).sum(), flat)
    return ft.tree.unflatten(spec, list(taken))


@given(st.sampled_from(list(ENTRIES)), st.integers(1, 9), st.integers(0, 99))
def test_it_is_the_gradient_of_that_entry_with_its_structure(of: Any, size: int, seed: int) -> None:
    params, batch = net_params(seed, F64), net_batch(size, seed, F64)
    grad, whole = ft.grad(net_loss, of=of), ft.grad(net_loss)
    taken, full = grad(params, batch), whole(params, batch)
    equal("the entry's gradient", taken.grads, by_hand(params, batch, of))
    same_bits("all else is that of the whole", taken._replace(grads=None), full._replace(grads=None))
    mean = grad.finished(params, batch)
    equal("finished", mean.grads, ft.tree.map(lambda leaf: leaf / full.weight, by_hand(params, batch, of)))


@pytest.mark.parametrize("of", list(ENTRIES), ids=str)
def test_the_laws_of_gradients_hold(of: Any) -> None:
    check_grad(ft.grad(net_loss, of=of), net_params(1, F64), net_batch(5, 2, F64))


class Counted(torch.autograd.Function):
    """x · w, with a record of the inputs whose gradient a backward pass was asked for."""

    asked: ClassVar[list[tuple[bool, ...]]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Counted.asked.append(ctx.needs_input_grad)
        x, w = ctx.saved_tensors
        return gradients[0] * w, (gradients[0] * x).sum()


@pytest.mark.parametrize(("of", "asked"), [("last", [(False, True)]), ("first", [(False, True), (True, False)])])
def test_there_is_no_backward_pass_through_what_is_not_wanted(of: str, asked: list[tuple[bool, ...]]) -> None:
    def loss(params: Any, batch: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = Counted.apply(batch, params["first"])
        outer: torch.Tensor = Counted.apply(inner, params["last"])
        return outer

    Counted.asked.clear()
    params = {"first": torch.tensor(2.0), "last": torch.tensor(3.0)}
    grads = ft.grad(loss, of=of)(params, torch.ones(2)).grads
    assert grads.item() == {"last": 4.0, "first": 6.0}[of]
    assert sorted(Counted.asked) == asked


def test_constants_are_differentiated_by_whoever_is_outside() -> None:
    # ∂x of Σ b x² y³ = 2 b x y³, whose derivative by y is 6 b x y².
    grad = ft.grad(lambda params, batch: batch * params["x"] ** 2 * params["y"] ** 3, of="x")
    batch = torch.tensor([1.0, 2.0], dtype=F64)
    x, y = torch.tensor(1.5, dtype=F64), torch.tensor(-2.0, dtype=F64, requires_grad=True)
    taken = grad({"x": x, "y": y}, batch)
    (by_autograd,) = torch.autograd.grad(taken.grads, y)
    by_transform = torch.func.grad(lambda y: grad({"x": x, "y": y}, batch).grads)(y.detach())
    assert by_autograd.item() == by_transform.item() == 6 * 3 * 1.5 * 4
    with torch.no_grad():
        assert not grad({"x": x, "y": y}, batch).grads.requires_grad


def test_traced_it_is_the_same() -> None:
    params, batch = net_params(0, F64), net_batch(4, 0, F64)
    grad = ft.grad(net_loss, of="hidden")
    flat, spec = ft.tree.flatten((params, batch))

    def leaves(*given: torch.Tensor) -> list[torch.Tensor]:
        return ft.tree.leaves(grad(*ft.tree.unflatten(spec, given)).grads)

    equal("traced", make_fx(leaves)(*flat)(*flat), ft.tree.leaves(by_hand(params, batch, "hidden")))


# --- combinators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", PLANS)
def test_parallel_in_every_plan_and_accumulate(how: Any) -> None:
    params, batch = net_params(0, F64), net_batch(7, 0, F64)
    expected = by_hand(params, batch, "out")
    equal(how, ft.parallel(ft.grad(net_loss, of="out"), 3, how=how)(params, batch).grads, expected)
    equal("accumulated", ft.accumulate(ft.grad(net_loss, of="out"), 3)(params, batch).grads, expected)


def test_exact_has_the_same_bits_for_every_number_of_workers() -> None:
    params, batch = net_params(0), net_batch(9)
    grad = ft.grad(net_loss, of="hidden")
    one, two = (ft.parallel(grad, 4, exact=True, workers=workers).finished(params, batch) for workers in (1, 3))
    same_bits("exact", one, two)


@pytest.mark.parametrize("reducer", [ft.reduce.median, ft.reduce.and_mask(0.5), ft.reduce.pcgrad], ids=str)
def test_reducers_see_the_parts_of_the_entry(reducer: ft.Reducer) -> None:
    # Alone in the params, the entry is all that there is to compare.
    params, batch = net_params(3, F64), net_batch(8, 3, F64)

    def alone(hidden: Any, batch: Any) -> Any:
        return net_loss({**params, "hidden": hidden}, batch)

    key = ft.random.key(0)
    taken = ft.parallel(ft.grad(net_loss, of="hidden"), 4, reducer).finished(params, batch, key=key)
    equal("reduced", taken, ft.parallel(ft.grad(alone), 4, reducer).finished(params["hidden"], batch, key=key))


@pytest.mark.parametrize("of", ["out.1", "hidden", ("scale", "hidden")], ids=str)
def test_examples_gradients_and_their_clipping(of: Any) -> None:
    params, batch = net_params(1, F64), net_batch(5, 1, F64)
    grad = ft.grad(net_loss, of=of)
    rows = [by_hand(params, ft.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch), of) for i in range(5)]
    stacked = ft.tree.stack(rows)
    equal("rows", ft.example_grads(grad, params, batch).grads, stacked)
    equal("by vmap", ft.example_grads(ft.accumulate(grad, 1), params, batch).grads, stacked)
    equal("in a budget", ft.example_grads(grad, params, batch, budget=1).grads, stacked)

    norms = [torch.cat([leaf.reshape(-1) for leaf in ft.tree.leaves(row)]).norm() for row in rows]
    factors = torch.stack([(0.7 / norm).clamp(max=1.0) for norm in norms])
    clipped = ft.tree.map(lambda leaf: torch.einsum("n,n...->...", factors, leaf), stacked)
    equal("scaled", scaled_sum(grad, params, batch, scale=lambda norms: (0.7 / norms).clamp(max=1.0)).grads, clipped)
    reduced = ft.parallel(grad, 2, ft.reduce.clip_per_example(0.7)).finished(params, batch).grads
    equal("the reducer", reduced, ft.tree.map(lambda leaf: leaf / batch["weight"].sum(), clipped))


def test_what_is_told_of_an_entry_is_told_by_its_own_names() -> None:
    params, batch = net_params(), net_batch(4)
    assert list(plan_of(ft.grad(net_loss, of="hidden"), params, batch)) == ["b", "w"]
    measured = ft.monitor(ft.grad(net_loss, of="out"), paths=True).finished(params, batch)
    assert {name for name in measured.aux if name.startswith("gradient.norm.")} == {"gradient.norm.0", "gradient.norm.1"}
    norm = sum(leaf.double().square().sum() for leaf in measured.grads).sqrt()
    assert measured.aux["gradient.norm"].item() == pytest.approx(norm.item())
    told = str(ft.explain(ft.parallel(ft.grad(net_loss, of=("out", "hidden.w")), 2)))
    assert "of: 'out' and 'hidden.w'; all else in the params is constant" in told


def test_truncated_backpropagation() -> None:
    params, loss, start = recurrent()
    batch = {"x": torch.randn(4, 6, 3), "y": torch.randn(4, 6, 2)}
    whole = ft.tbptt(ft.grad(loss), 2, start).finished(params, batch).grads
    part = ft.tbptt(ft.grad(loss, of="read.weight"), 2, start).finished(params, batch).grads
    equal("its entry", part, whole["read.weight"])
    parts = ft.tbptt(ft.parallel(ft.grad(loss, lanes=True, of="read.weight"), 2, how="loop"), 2, start)
    equal("in parts", parts.finished(params, batch).grads, whole["read.weight"])


def test_remat_keys_and_carry() -> None:
    params, key = net_params(0, F64), ft.random.key(3)
    batch = net_batch(6, 0, F64)

    def again(params: Any, batch: Any) -> Any:
        return ft.Losses(*ft.remat(lambda params, batch: tuple(net_loss(params, batch)[:2]))(params, batch))

    equal("remat", ft.grad(again, of="hidden")(params, batch).grads, by_hand(params, batch, "hidden"))
    keyed, of_hidden = ft.grad(keyed_loss)(params, batch, key=key), ft.grad(keyed_loss, of="hidden")(params, batch, key=key)
    equal("keyed", of_hidden.grads, keyed.grads["hidden"])
    carry = carried_start(F64)
    carried, one = (ft.grad(carried_loss, of=of)(params, batch, carry=carry) for of in (None, "scale"))
    equal("carried", (one.grads, one.carry), (carried.grads["scale"], carried.carry))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["hiden", "hidden.q", "scale.0", "", "hidden."])
def test_a_name_that_is_no_entry_lists_those_there_are(of: str) -> None:
    if not of:
        with pytest.raises(ft.ArgumentError, match="names an entry"):
            ft.grad(net_loss, of=of)
        return
    with pytest.raises(ft.TreeError, match=f"no entry {of!r}: expected one of 'hidden', 'out', 'scale', 'hidden.b'"):
        ft.grad(net_loss, of=of)(net_params(), net_batch(2))


@pytest.mark.parametrize("of", [3, (), ("hidden", 1), ["hidden"], ("hidden", "hidden")], ids=str)
def test_names_are_texts_each_once(of: Any) -> None:
    with pytest.raises(ft.ArgumentError, match=r"of names an entry"):
        ft.grad(net_loss, of=of)


def test_other_refusals() -> None:
    params, batch = net_params(), net_batch(2)
    with pytest.raises(ft.TreeError, match=r"'hidden', 'hidden.w' have leaves in common"):
        ft.grad(net_loss, of=("hidden", "hidden.w"))(params, batch)
    with pytest.raises(ft.TreeError, match="a single tensor; give them names"):
        ft.grad(lambda params, batch: params * batch, of="w")(torch.ones(()), torch.ones(2))
    with pytest.raises(ft.TreeError, match=r"two entries of the params have the name 'a.b'"):
        ft.grad(net_loss, of="a.b")({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}, batch)
    counted = {**params, "count": torch.tensor(3), "empty": {}}
    taken = ft.grad(net_loss, of="out")(counted, batch).grads
    equal("whole numbers elsewhere", taken, ft.grad(net_loss)(params, batch).grads["out"])
    for of, message in (("count", "floating params"), ("empty", "no entry 'empty'")):
        with pytest.raises(ft.TreeError, match=message):
            ft.grad(net_loss, of=of)(counted, batch)
        with pytest.raises(ft.TreeError, match=message):
            ft.example_grads(ft.grad(net_loss, of=of), counted, batch)


def test_constants_changed_in_place_are_an_error() -> None:
    def loss(params: Any, batch: torch.Tensor) -> torch.Tensor:
        params["y"].mul_(2)
        return params["x"] * batch

    with pytest.raises(ft.LossError, match="changes its params in place"):
        ft.grad(loss, of="x")({"x": torch.ones(()), "y": torch.ones(())}, torch.ones(2))


def test_an_entry_is_found_filled_and_left_alone() -> None:
    params = {"flat.name": torch.ones(2), "deep": {"list": [torch.zeros(1), {"w": torch.ones(3)}], "none": None}}
    found = entry(params, "deep.list.1")
    filled = found.whole([torch.full((3,), 7.0)])
    assert filled["deep"]["list"][1]["w"].tolist() == [7.0] * 3
    assert filled["deep"]["list"][0] is params["deep"]["list"][0]
    assert params["deep"]["list"][1]["w"].tolist() == [1.0] * 3
    assert entry(params, "flat.name").value is params["flat.name"]
