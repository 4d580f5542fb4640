"""Law 9, round trips: ravel/unravel, stack/unstack, divide/concat, save/load, config to text and back."""

from __future__ import annotations

import json
import math
import tempfile
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from functrain.core import tree
from functrain.runs.checkpoints import Checkpoints
from functrain.runs.config import config_from_dict, config_to_dict
from functrain.runs.store import hash_tree, load_tree, save_tree

Pair = namedtuple("Pair", ["left", "right"])

FLOATS = ("float64", "float32", "float16")
EXACT = (*FLOATS, "int32", "int16", "int8", "uint8", "bool")
ALL = (*EXACT, "int64", "complex64")
FEW = settings(max_examples=60, deadline=None)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...], first: int | None = None) -> Tensor:
    """Any bits of any shape (the first dimension can be given), at times as bfloat16 or as a view."""
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    if first is not None:
        shape = (first, *shape[:2])
    dtype = numpy.dtype(draw(st.sampled_from(dtypes)))
    raw = draw(st.binary(min_size=0, max_size=64)) or b"\0"
    size = math.prod(shape) * dtype.itemsize
    data = bytearray((raw * (size // len(raw) + 1))[:size])
    if dtype == numpy.bool_:
        data = bytearray(byte & 1 for byte in data)
    leaf = torch.zeros(shape, dtype=getattr(torch, dtype.name))
    if size:
        leaf = torch.from_numpy(numpy.frombuffer(data, dtype).reshape(shape))
    if dtype == numpy.float16 and draw(st.booleans()):
        leaf = leaf.view(torch.bfloat16)
    if first is None and leaf.ndim >= 2 and draw(st.booleans()):
        leaf = leaf.transpose(0, 1)
    return leaf


def trees(dtypes: tuple[str, ...], first: int | None = None) -> st.SearchStrategy[Any]:
    keys = st.text(max_size=4) | st.sampled_from(["/", "~", "~1", "a.b", "a/b", "__metadata__"])
    return st.recursive(
        tensors(dtypes, first) | st.none(),
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=3),
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=6,
    )


def same(a: Any, b: Any) -> bool:
    """The same structure, the same dtypes, shapes and bits."""
    if not tree.same_structure(a, b):
        return False
    return all(
        x.dtype == y.dtype and x.shape == y.shape and hash_tree(x) == hash_tree(y)
        for x, y in zip(tree.leaves(a), tree.leaves(b))
    )


def as_values(drawn: Any) -> Any:
    """The same tree without NaN, whose payload arithmetic need not keep."""
    return tree.map(lambda leaf: leaf.nan_to_num() if leaf.is_floating_point() else leaf, drawn)


@FEW
@given(trees(EXACT))
def test_unravel_undoes_ravel(drawn: Any) -> None:
    values = as_values(drawn)
    vector, unravel = tree.ravel(values)
    assert vector.shape == (sum(leaf.numel() for leaf in tree.leaves(values)),)
    assert same(unravel(vector), values)


@FEW
@given(trees(("int64",)))
def test_unravel_undoes_ravel_of_int64(drawn: Any) -> None:
    vector, unravel = tree.ravel(drawn)
    assert same(unravel(vector), drawn)


@FEW
@given(trees(ALL), st.integers(1, 4))
def test_unstack_undoes_stack(drawn: Any, copies: int) -> None:
    zeros = tree.map(torch.zeros_like, drawn)
    members = [drawn if place % 2 else zeros for place in range(copies)]
    stacked = tree.stack(members)
    if not tree.leaves(drawn):
        return
    again = tree.unstack(stacked)
    assert len(again) == copies
    assert all(same(member, other) for member, other in zip(members, again))
    assert same(tree.stack(again), stacked)


@FEW
@given(st.data(), st.integers(1, 9), st.integers(1, 12))
def test_concat_undoes_divide(data: st.DataObject, size: int, parts: int) -> None:
    batch = data.draw(trees(ALL, first=size).filter(tree.leaves))
    divided = tree.divide(batch, parts)
    sizes = [tree.batch_size(part) for part in divided]
    assert len(divided) == min(parts, size)
    assert max(sizes) - min(sizes) <= 1
    assert same(tree.concat(divided), batch)


@FEW
@given(trees(ALL))
def test_load_undoes_save(drawn: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.safetensors"
        save_tree(path, drawn)
        like = tree.map(lambda leaf: torch.empty_like(leaf, device="meta"), drawn)
        loaded = load_tree(path, like)
        assert same(loaded, drawn)
        assert hash_tree(loaded) == hash_tree(drawn)
        first = path.read_bytes()
        save_tree(path, loaded)
        assert path.read_bytes() == first


@settings(max_examples=20, deadline=None)
@given(trees(ALL), st.integers(0, 10**9))
def test_a_loaded_checkpoint_is_the_saved_state(drawn: Any, position: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(drawn, position, {"at": position})
        loaded = checkpoints.load(drawn)
        assert same(loaded.state, drawn)
        assert (loaded.position, loaded.record, loaded.skipped) == (position, {"at": position}, [])


# --- configs ------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = 1
    GREEN = (2, "two")


@dataclass(frozen=True)
class Leaf:
    scale: float
    colour: Colour
    name: str | None


@dataclass(frozen=True)
class Other:
    scale: float
    on: bool


@dataclass(frozen=True)
class Program:
    steps: int
    rates: tuple[float, ...]
    pair: tuple[int, bool]
    leaf: Leaf
    either: Leaf | Other
    many: tuple[Leaf | Other, ...]
    maybe: Leaf | None
    path: Path | None
    how: Literal["a", "b", 1]
    table: dict[str, tuple[Colour, ...]]
    mixed: bool | int | float | str | None


REAL = st.floats(allow_nan=False)
TEXT = st.text()
LEAF = st.builds(Leaf, REAL, st.sampled_from(Colour), st.none() | TEXT)
EITHER = LEAF | st.builds(Other, REAL, st.booleans())
# A mixed field keeps text apart from numbers, so what is not finite (written as text) stays out of it.
MIXED = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
PROGRAM = st.builds(
    Program,
    steps=st.integers(),
    rates=st.lists(REAL, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.booleans()),
    leaf=LEAF,
    either=EITHER,
    many=st.lists(EITHER, max_size=3).map(tuple),
    maybe=st.none() | LEAF,
    path=st.none() | st.text(st.characters(exclude_characters="\0")).map(Path),
    how=st.sampled_from(["a", "b", 1]),
    table=st.dictionaries(TEXT, st.lists(st.sampled_from(Colour), max_size=2).map(tuple), max_size=2),
    mixed=MIXED,
)


@settings(max_examples=150, deadline=None)
@given(PROGRAM)
def test_a_config_is_the_same_after_text_and_back(config: Program) -> None:
    text = json.dumps(config_to_dict(config), allow_nan=False)
    again = config_from_dict(Program, json.loads(text))
    assert again == config
    # 0.0 == -0.0 and True == 1, but not as text.
    assert repr(again) == repr(config)
