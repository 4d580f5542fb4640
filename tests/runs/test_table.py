"""The table of epochs: every line as long as its header, every number in its place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.runs.table import Table, cell

COLUMNS = ["epoch", "train/loss", "test/accuracy", "seconds", "a long name it is"]
LETTERS = st.text(st.characters(codec="ascii", categories=["L"]))
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), LETTERS)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), VALUES))
def test_all_lines_have_one_length(values: dict[str, object]) -> None:
    table = Table(COLUMNS)
    assert len(table.row(values)) == len(table.header())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("epoch", 12, "12"),
        ("position", 123456789012, "1.235e+11"),
        ("train/loss", 0.000123456, "0.0001235"),
        ("train/loss", 123456.0, "1.235e+05"),
        ("train/loss", torch.tensor(0.5), "0.5"),
        ("train/loss", math.nan, "nan"),
        ("train/loss", -math.inf, "-inf"),
        ("test/accuracy", 0.97314, "0.9731"),
        ("test/accuracy", math.nan, "nan"),
        ("seconds", 83.44, "83.4s"),
        ("note", "best", "best"),
        ("note", None, "-"),
        ("done", True, "True"),
    ],
)
def test_numbers_are_compact(name: str, value: object, text: str) -> None:
    assert cell(name, value) == text


def test_columns_stand_under_their_names() -> None:
    table = Table(["epoch", "test/accuracy"])
    assert table.header() == "     epoch  test/accuracy"
    assert table.row({"epoch": 3, "test/accuracy": 0.5, "other": 9}) == "         3         0.5000"
    assert Table([]).row({"a": 1}) == ""
