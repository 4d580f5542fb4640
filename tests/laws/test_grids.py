"""Law 14, of grids: sizes, declaration order, no duplicates; and law 8, of the populations of a search."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain.search import Grid, grid, grid_search
from functrain.search.canonical import canonical, config_key

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.0, 1.0, 0.5, -0.0]),
    st.sampled_from(["", "a", "ab"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("pq"), inner, max_size=2)
    ),
    max_leaves=4,
)
modest = settings(max_examples=60, deadline=None)


def axes(names: str) -> st.SearchStrategy[dict[str, list[Any]]]:
    """Alternatives that differ, for some of the names."""
    return st.dictionaries(
        st.sampled_from(names), st.lists(values, min_size=1, max_size=3, unique_by=json.dumps), max_size=3
    )


def grids(names: str) -> st.SearchStrategy[Grid]:
    """Products, and unions of two of them."""
    products = axes(names).map(lambda alternatives: grid(**alternatives))
    return st.one_of(products, st.tuples(products, products).map(lambda pair: pair[0] | pair[1]))


def texts(configs: Any) -> list[str]:
    return [canonical(config) for config in configs]


@modest
@given(axes("abcd"))
def test_a_grid_is_the_product_of_its_alternatives_in_declaration_order(
    alternatives: dict[str, list[Any]],
) -> None:
    made = grid(**alternatives)
    assert len(made) == math.prod(map(len, alternatives.values()))
    assert texts(made) == texts(
        dict(zip(alternatives, row)) for row in itertools.product(*alternatives.values())
    )


@modest
@given(grids("ab"), grids("cd"))
def test_sizes_multiply_in_a_product_whose_last_factor_varies_fastest(a: Grid, b: Grid) -> None:
    product = a * b
    assert len(product) == len(a) * len(b)
    assert texts(product) == texts({**x, **y} for x in a for y in b)


@modest
@given(grids("ab"), grids("ab"))
def test_a_union_keeps_the_order_and_the_first_of_duplicates(a: Grid, b: Grid) -> None:
    union = a | b
    assert texts(union) == list(dict.fromkeys(texts(a) + texts(b)))
    assert len(union) == len(a) + sum(config not in a for config in b)


@modest
@given(grids("ab"), grids("abc"), grids("cd"))
def test_the_algebra(a: Grid, b: Grid, c: Grid) -> None:
    assert (a | b) | c == a | (b | c)
    assert a | a == a == a | Grid()
    assert a * Grid([{}]) == a == Grid([{}]) * a
    assert len(a * Grid()) == 0
    assert (a | Grid([{"a": "new"}])) * c == a * c | Grid([{"a": "new"}]) * c


@modest
@given(grids("abcd"))
def test_a_grid_has_no_duplicates_and_finds_its_own(g: Grid) -> None:
    keys = [config_key(config) for config in g]
    assert len(set(keys)) == len(g)
    assert all(config in g and canonical(g[place]) == canonical(config) for place, config in enumerate(g))
    assert Grid(reversed([dict(reversed(config.items())) for config in g])) == Grid(reversed(list(g)))
    assert hash(Grid(list(g))) == hash(g)


@modest
@given(axes("abcd"))
def test_a_config_survives_json(alternatives: dict[str, list[Any]]) -> None:
    for config in grid(**alternatives):
        again = json.loads(json.dumps(config, allow_nan=False))
        assert canonical(again) == canonical(config)
        assert config_key(dict(reversed(again.items()))) == config_key(config)


# --- law 8, of searches ---


def experiment(config: dict[str, Any]) -> ft.Experiment:
    """A regression by a small network; `together` numbers are in the state alone."""
    key = ft.random.key(config.get("seed", 0))
    x = ft.random.normal(ft.random.key(7), (40, 3))
    source = ft.arrays({"x": x, "y": x.sum(1).sin()}).shuffle(seed=1).batch(16)
    width = config["width"]
    params = {
        "w": ft.random.normal(key, (3, width)) / 2,
        "v": ft.random.normal(ft.random.fold_in(key, 1), (width,)) / 2,
    }

    def loss(params: Any, batch: Any, *, key: torch.Tensor) -> torch.Tensor:
        hidden = ft.random.dropout(torch.tanh(batch["x"] @ params["w"]), 0.2, key)
        return (hidden @ params["v"] - batch["y"]) ** 2

    def plain(params: Any, batch: Any) -> torch.Tensor:
        return (torch.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2

    optimizer = getattr(ft.optim, config["optimizer"])(ft.optim.cosine(config["lr"], 9))
    return ft.Experiment(
        ft.step(ft.grad(loss), optimizer),
        params,
        source,
        epochs=3,
        seed=config.get("seed", 0),
        evaluate=lambda state: ft.evaluate(plain, state.params, source),
        score="loss",
        maximize=False,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_population_scores_as_its_members_alone(optimizer: str) -> None:
    over = grid(optimizer=optimizer, width=[4, 8], lr=[1e-3, 1e-2, 0.1], seed=[0, 1])
    alone = grid_search(experiment, over)
    joined = grid_search(experiment, over, together=("lr", "seed"))
    assert {trial.how for trial in alone.trials} == {"alone"}
    assert {trial.how for trial in joined.trials} == {"population of 6"}, joined.explain()
    scores = {config_key(trial.config): trial.score for trial in joined.trials}
    for trial in alone.trials:
        assert scores[config_key(trial.config)] == pytest.approx(trial.score, rel=1e-3)
    assert joined.best == alone.best
    torch.testing.assert_close(joined.state.params, alone.state.params, rtol=1e-3, atol=1e-4)
