"""Health of trees against NumPy, and a monitor that leaves its gradient alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import carried_loss, carried_start, keyed_loss, net_batch, net_loss, net_params, recurrent
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain.testing import check_grad, equal, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.complex64]
ODD = st.sampled_from([float("nan"), float("inf"), float("-inf")])
NAMES = ["gradient.norm", "gradient.max", "gradient.nan", "gradient.inf"]


def expected(leaf: torch.Tensor) -> list[float]:
    """NaN, infinities, norm and largest of a leaf, by NumPy."""
    plain = leaf.to(torch.complex128 if leaf.is_complex() else torch.float64).numpy().ravel()
    nan = np.isnan(plain)
    infinite = np.isinf(plain) & ~nan
    finite = np.abs(plain[~nan & ~infinite])
    largest = finite.max(initial=0.0)
    return [nan.sum(), infinite.sum(), largest * np.sqrt(((finite / (largest or 1.0)) ** 2).sum()), largest]


def holed(leaf: torch.Tensor, holes: list[tuple[int, float]]) -> torch.Tensor:
    """A copy of a floating leaf with other numbers at some places."""
    flat = leaf.reshape(-1).clone()
    if flat.numel() and leaf.dtype != torch.int32:
        for place, value in holes:
            flat[place % flat.numel()] = value
    return flat.reshape(leaf.shape)


def assert_health(got: ft.Health, leaf: torch.Tensor) -> None:
    assert [value.ndim for value in got] == [0] * 4
    assert got.nan.dtype == got.inf.dtype == torch.int64
    assert [float(value) for value in got] == pytest.approx(expected(leaf), rel=1e-12)


leaves = st.builds(
    lambda shape, dtype, seed, holes, scale: holed(
        (scale * np.random.default_rng(seed).normal(size=shape) * torch.ones(())).to(dtype)
        if shape == ()
        else torch.from_numpy(scale * np.random.default_rng(seed).normal(size=shape)).to(dtype),
        holes,
    ),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 63), ODD), max_size=3),
    st.sampled_from([1.0, 1e-3, 100.0]),
)


@given(trees=st.lists(leaves, min_size=1, max_size=4))
def test_health_is_numpys(trees):
    found = ft.health({"layer": trees, "more": (trees[0],)})
    assert list(found) == [f"layer.{place}" for place in range(len(trees))] + ["more.0"]
    for place, leaf in enumerate(trees):
        assert_health(found[f"layer.{place}"], leaf)


@given(leaf=leaves)
def test_health_is_the_same_inside_vmap_and_a_trace(leaf):
    plain = tuple(ft.health(leaf)[""])
    stacked = torch.func.vmap(lambda x: tuple(ft.health(x)[""]))(torch.stack([leaf, leaf * 0]))
    assert [value[0].item() for value in stacked] == pytest.approx([value.item() for value in plain], rel=1e-12)
    traced = make_fx(lambda x: tuple(ft.health(x)[""]))(torch.zeros_like(leaf))(leaf)
    assert [value.item() for value in traced] == pytest.approx([value.item() for value in plain], rel=1e-12)
    assert_health(ft.Health(*traced), leaf)


@pytest.mark.parametrize("size", [1e-200, 1e200, 1.7e308])
def test_squares_of_float64_may_leave_its_range(size):
    leaf = torch.tensor([3 / 5, 4 / 5, 0.0], dtype=torch.float64) * size
    assert_health(ft.health(leaf)[""], leaf)
    assert ft.health(leaf)[""].norm.item() == pytest.approx(size, rel=1e-12)


def test_what_has_no_numbers_has_no_size():
    for leaf in (torch.zeros(0), torch.zeros(3, 0, dtype=torch.float64), torch.full((2,), float("nan"))):
        assert ft.health(leaf)[""].norm.item() == ft.health(leaf)[""].max.item() == 0.0
    assert ft.health({}) == {}
    assert ft.health(torch.tensor([True, False, True]))[""].norm.item() == pytest.approx(2**0.5)
    assert ft.health(torch.tensor([448.0, float("nan")]).to(torch.float8_e4m3fn))[""].nan.item() == 1
    half = complex(float("inf"), float("nan"))
    assert [int(value) for value in ft.health(torch.tensor([half, 3 + 4j]))[""]] == [1, 0, 5, 5]
    large = torch.tensor([3e38 + 3e38j])
    assert ft.health(large)[""].max.item() == pytest.approx(3e38 * 2**0.5)
    assert ft.health(large)[""].inf.item() == 0
    with pytest.raises(ft.TreeError, match="'w' is float"):
        ft.health({"w": 1.0})


def test_health_keeps_no_graph():
    leaf = torch.ones(3, requires_grad=True)
    assert not any(value.requires_grad for value in ft.health(leaf)[""])


# --- monitor ------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 7), seed=st.integers(0, 99), parts=st.integers(1, 4), paths=st.booleans())
def test_a_monitored_step_has_the_same_bits_and_numpys_measures(size, seed, parts, paths):
    grad, batch = ft.parallel(ft.grad(keyed_loss), parts, how="loop"), net_batch(size, seed)
    plain = ft.step(grad, ft.optim.adam(0.01))
    watched = ft.step(ft.monitor(grad, paths=paths), ft.optim.adam(0.01))
    (state, metrics), start = plain(plain.init(net_params(seed)), batch), plain.init(net_params(seed))
    got, measured = watched(start, batch)
    same_bits("the state", got, state)
    same_bits("the metrics", {name: measured[name] for name in metrics}, metrics)
    taken = grad.finished(start.params, batch, key=ft.random.fold_in(start.key, start.position)).grads
    named = {name: leaf.double().numpy() for name, leaf in ft.named_params(taken).items()}
    whole = np.concatenate([leaf.ravel() for leaf in named.values()])
    assert measured["gradient.norm"].item() == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    assert measured["gradient.max"].item() == np.abs(whole).max()
    assert measured["gradient.nan"].item() == measured["gradient.inf"].item() == 0
    by_path = {name: measured[f"gradient.norm.{name}"].item() for name in named} if paths else {}
    for name, norm in by_path.items():
        assert norm == pytest.approx(np.linalg.norm(named[name]), rel=1e-12)
    assert len(measured) == len(metrics) + 4 * (1 + len(named) * paths)


def test_a_monitored_gradient_is_lawful_and_what_it_measures_does_not_depend_on_plans():
    check_grad(ft.monitor(ft.grad(net_loss)), net_params(), net_batch(5))
    params, batch = net_params(), net_batch(6)
    inside = ft.monitor(ft.grad(net_loss))
    for how in ("fused", "loop", "vmap", "threads"):
        taken = ft.parallel(inside, 3, how=how, workers=2).finished(params, batch)
        equal(how, taken, ft.grad(net_loss).finished(params, batch))
    around = ft.monitor(ft.parallel(ft.grad(net_loss), 3))
    assert set(around.finished(params, batch).aux) == {"size", *NAMES}


def test_counts_of_a_sick_gradient():
    def loss(params, batch):
        # The square root has an infinite slope at 0, and 0 times that is NaN.
        return batch[:, 0] * params["root"].sqrt().sum() + batch @ params["w"]

    params = {"root": torch.tensor([0.0, 4.0]), "w": torch.tensor([2.0, 1.0])}
    aux = ft.monitor(ft.grad(loss), paths=True).finished(params, torch.tensor([[1.0, 2.0]])).aux
    assert {name: aux[name].item() for name in NAMES} == {
        "gradient.norm": pytest.approx((0.25**2 + 1 + 4) ** 0.5),
        "gradient.max": 2.0,
        "gradient.nan": 0.0,
        "gradient.inf": 1.0,
    }
    assert aux["gradient.inf.root"].item() == 1
    assert aux["gradient.norm.w"].item() == pytest.approx(5**0.5)
    sick = ft.monitor(ft.grad(loss)).finished(params, torch.zeros(1, 2)).aux
    assert [sick[name].item() for name in NAMES] == [0.0, 0.0, 1.0, 0.0]


def test_aux_keeps_its_names():
    def measured(aux):
        def loss(params, batch):
            return ft.Losses((params - batch) ** 2, aux=None if aux is None else ft.tree.map(lambda _: batch, aux))

        step = ft.step(ft.monitor(ft.grad(loss)), ft.optim.sgd(0.1))
        return set(step(step.init(torch.tensor(0.0)), torch.ones(2))[1]) - {"loss", "weight", *NAMES}

    assert measured(None) == set()
    assert measured(0) == {"aux"}
    assert measured({"accuracy": 0, "by": {"name": 0}}) == {"accuracy", "by.name"}
    assert measured((0, 0)) == {"aux.0", "aux.1"}
    for taken in ({"gradient.norm": 0}, {"gradient": {"max": 0}}):
        with pytest.raises(ft.LossError, match=r"'gradient\.(norm|max)' already"):
            measured(taken)
    twice = ft.monitor(ft.monitor(ft.grad(net_loss)))
    with pytest.raises(ft.LossError, match="one monitor around a gradient is enough"):
        twice.finished(net_params(), net_batch(2))


def sick_loss(params, batch):
    return net_loss(params, {**batch, "x": torch.where(batch["x"] > 90, torch.nan, batch["x"])})


def sick_batch(size: int, place: int):
    batch = net_batch(size)
    batch["x"][place] = 99.0
    return batch


def test_raise_names_the_leaf_the_counts_and_the_part():
    grad, params = ft.grad(sick_loss), net_params()
    alone = ft.monitor(grad, nonfinite="raise")
    same_bits("healthy", alone.finished(params, net_batch(4)).grads, grad.finished(params, net_batch(4)).grads)
    text = r"at 'hidden\.w' has 12 NaN and 0 infinite of 12 numbers, shape \(3, 4\)"
    with pytest.raises(ft.LossError, match=text):
        alone.finished(params, sick_batch(4, 1))
    for how in ("loop", "threads"):
        with pytest.raises(ft.LossError, match=text) as caught:
            ft.parallel(alone, 3, how=how, workers=2).finished(params, sick_batch(6, 3))
        assert "in part 2 of 3" in "".join(caught.value.__notes__)
    bare = ft.monitor(ft.grad(lambda params, batch: params.sqrt() * batch), nonfinite="raise")
    with pytest.raises(ft.LossError, match=r"the gradient has 0 NaN and 1 infinite of 1 numbers, shape \(\)"):
        bare.finished(torch.tensor(0.0), torch.ones(2))


def test_raise_says_where_it_cannot_look():
    watched = ft.monitor(ft.grad(net_loss), nonfinite="raise")
    step = ft.step(watched, ft.optim.sgd(0.1))
    compiled, together = ft.compiled(step), ft.population(step)
    with pytest.raises(ft.ArgumentError, match="looks at values"):
        compiled(compiled.init(net_params()), net_batch(2))
    with pytest.raises(ft.ArgumentError, match="looks at values"):
        together(together.init([step.init(net_params())]), net_batch(2))
    with pytest.raises(ft.ArgumentError, match="looks at values"):
        ft.parallel(watched, 2, how="vmap")(net_params(), net_batch(2))
    with pytest.raises(ft.ArgumentError, match="'report' or 'raise'"):
        ft.monitor(ft.grad(net_loss), nonfinite="skip")
    with pytest.raises(ft.ArgumentError, match=r"write ft\.grad"):
        ft.monitor(net_loss)


def test_members_and_windows_are_measured():
    step = ft.step(ft.monitor(ft.grad(carried_loss), paths=True), ft.optim.sgd(0.1))
    members = [step.init(net_params(seed), carry=carried_start()) for seed in range(2)]
    together = ft.population(step)
    _, metrics = together(together.init(members), net_batch(3))
    for place, member in enumerate(members):
        _, alone = step(member, net_batch(3))
        equal(f"member {place}", {name: value[place] for name, value in metrics.items()}, alone)

    params, loss, start = recurrent()
    batch = {"x": torch.ones(2, 4, 3), "y": torch.zeros(2, 4, 2)}
    windowed = ft.tbptt(ft.step(ft.monitor(ft.grad(loss)), ft.optim.sgd(0.1)), 2, start)
    state, metrics = windowed(windowed.init(params), batch)
    plain = ft.tbptt(ft.step(ft.grad(loss), ft.optim.sgd(0.1)), 2, start)
    same_bits("windows", state, plain(plain.init(params), batch)[0])
    assert metrics["gradient.norm"].item() > 0
    whole = ft.monitor(ft.tbptt(ft.grad(loss), 2, start)).finished(params, batch)
    same_bits("a windowed gradient", whole.grads, ft.tbptt(ft.grad(loss), 2, start).finished(params, batch).grads)


def test_a_compiled_step_is_measured():
    step = ft.step(ft.monitor(ft.grad(lambda params, batch: params["root"].sqrt().sum() * batch)), ft.optim.sgd(0.1))
    compiled = ft.compiled(step)
    for root in ([1.0, 4.0], [0.0, 4.0]):
        _, metrics = compiled(compiled.init({"root": torch.tensor(root)}), torch.ones(2))
        finite = [0.5 / x**0.5 for x in root if x]
        sizes = [np.linalg.norm(finite), max(finite), 0, 2 - len(finite)]
        assert [metrics[name].item() for name in NAMES] == pytest.approx(sizes, rel=1e-6)


def test_explain_shows_what_is_watched():
    stage = ft.explain(ft.monitor(ft.parallel(ft.grad(net_loss), 2), nonfinite="raise"))
    assert stage.title == "monitor"
    assert stage.facts["not finite"] == "an error"
    assert stage.inner[0].title == "parallel, 2 parts"
