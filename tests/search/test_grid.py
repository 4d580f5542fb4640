"""Grids as a user writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError
from functrain.search import Grid, grid, nested
from functrain.search.canonical import canonical, config_key


def test_text_none_and_bare_values_are_atoms() -> None:
    assert list(grid(loss="hinge", clip=None, lr=0.1, amp=[True])) == [{"loss": "hinge", "clip": None, "lr": 0.1, "amp": True}]
    assert [config["clip"] for config in grid(clip=[None, 1.0])] == [None, 1.0]


def test_ranges_arrays_and_tuples_are_alternatives() -> None:
    lrs = [config["lr"] for config in grid(lr=np.logspace(-2, 0, 3))]
    assert lrs == [0.01, 0.1, 1.0]
    assert [type(lr) for lr in lrs] == [float] * 3
    assert [config["seed"] for config in grid(seed=range(3))] == [0, 1, 2]
    assert [config["seed"] for config in grid(seed=torch.arange(2))] == [0, 1]
    assert [config["hidden"] for config in grid(hidden=((64, 32), (8,)))] == [[64, 32], [8]]


def test_grids_nest() -> None:
    over = grid(lr=[0.1, 0.2], optimizer=[grid(name=["sgd"], momentum=[0, 0.9]), grid(name=["adam"])])
    assert [config["optimizer"] for config in over][:3] == [
        {"name": "sgd", "momentum": 0},
        {"name": "sgd", "momentum": 0.9},
        {"name": "adam"},
    ]
    assert len(over) == 6
    assert list(grid(optimizer=grid(name="sgd"))) == [{"optimizer": {"name": "sgd"}}]


def test_one_one_point_zero_and_true_are_different_values() -> None:
    over = grid(x=[1, 1.0, True, 1, "1", None])
    assert len(over) == 5
    assert [type(config["x"]) for config in over] == [int, float, bool, str, type(None)]
    assert {"x": 1} in over
    assert {"x": 2} not in over
    assert {"x": object()} not in over
    assert grid(x=1) != grid(x=True)
    assert len({grid(x=1), grid(x=1.0), grid(x=[1, 1])}) == 2


def test_a_grid_does_not_change_through_what_it_hands_out() -> None:
    inner: dict[str, Any] = {"depth": [1]}
    over = Grid([{"model": inner}])
    inner["depth"].append(2)
    over[0]["model"]["depth"] = "gone"
    for config in over:
        config.clear()
    assert list(over) == [{"model": {"depth": [1]}}]


def test_slices_are_grids_and_places_count_from_either_end() -> None:
    over = grid(x=range(5))
    assert over[1:3] == grid(x=[1, 2])
    assert over[-1] == {"x": 4}
    with pytest.raises(IndexError):
        over[5]


def test_a_key_is_the_same_in_every_process_and_order() -> None:
    assert config_key({"lr": 0.1, "width": 32}) == "05b9f844440c0aed"
    assert config_key({"width": np.int64(32), "lr": np.float64(0.1)}) == config_key({"lr": 0.1, "width": 32})
    assert config_key({"data": Path("a") / "b"}) == config_key({"data": "a/b"})
    assert config_key({"x": torch.tensor(3)}) == config_key({"x": 3})
    assert canonical({"b": (1, 2), "a": "é"}) == '{"a":"\\u00e9","b":[1,2]}'


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid(a=1) * grid(b=1, a=2), "both grids of a product have 'a'"),
        (lambda: (grid(a=1) | grid(b=1)) * grid(b=2), "'b'"),
        (lambda: grid(a=[]), "a has no values"),
        (lambda: grid(model=[torch.relu]), "model is .*builtin"),
        (lambda: grid(model={"act": {"fn": print}}), "model.act.fn is"),
        (lambda: grid(clip=[1.0, float("inf")]), "clip is inf"),
        (lambda: grid(x=float("nan")), "x is nan"),
        (lambda: grid(model=[{1: "a"}]), "model has the key 1"),
        (lambda: grid(x=np.longdouble(1)), "x is .*longdouble"),
        (lambda: config_key({"x": {1, 2}}), "x is {1, 2}"),
        (lambda: Grid({"a": 1}), "made of configs"),
        (lambda: Grid(["a"]), "a config is a dict"),
        (lambda: nested([("a", 1), ("a", 2)]), "'a'"),
        (lambda: nested([("a", 1), [("b", 2), ("a", 2)]]), "'a'"),
        (lambda: nested([("a", 1, 2)]), "expected a pair"),
        (lambda: nested(["ab"]), "pairs"),
        (lambda: nested({"a": 1}), "nested takes"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_product_with_anything_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=re.escape("*")):
        grid(a=1) * 2  # type: ignore[operator]
    with pytest.raises(TypeError):
        grid(a=1) | {"a": 1}  # type: ignore[operator]
    assert grid(a=1) != [{"a": 1}]


# --- junky's nested form ---


def test_junkys_first_example() -> None:
    assert list(nested([("a", [50, 100]), ("b", [0.1, 0.5])])) == [
        {"a": 50, "b": 0.1},
        {"a": 50, "b": 0.5},
        {"a": 100, "b": 0.1},
        {"a": 100, "b": 0.5},
    ]


def test_junkys_second_example() -> None:
    assert list(nested([("a", [50, 100]), [("b", [0.1, 0.5])], [("b", None), ("c", ["X", "Y"])]])) == [
        {"a": 50, "b": 0.1},
        {"a": 50, "b": 0.5},
        {"a": 100, "b": 0.1},
        {"a": 100, "b": 0.5},
        {"a": 50, "b": None, "c": "X"},
        {"a": 50, "b": None, "c": "Y"},
        {"a": 100, "b": None, "c": "X"},
        {"a": 100, "b": None, "c": "Y"},
    ]


def test_nesting_goes_on_and_pairs_may_be_lists() -> None:
    spec = [["a", [1, 2]], [["b", "xy"], [["c", 3]], [["d", 4]]], []]
    assert list(nested(spec)) == [
        {"a": 1, "b": "xy", "c": 3},
        {"a": 1, "b": "xy", "d": 4},
        {"a": 2, "b": "xy", "c": 3},
        {"a": 2, "b": "xy", "d": 4},
        {"a": 1},
        {"a": 2},
    ]


def test_duplicates_are_dropped() -> None:
    assert list(nested([[("a", [1, 1, 2])], [("a", [2, 3])]])) == [{"a": 1}, {"a": 2}, {"a": 3}]
