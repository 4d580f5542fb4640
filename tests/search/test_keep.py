"""States as bytes: round trips over every structure and dtype, and damage."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain.core.errors import RunError, TreeError
from functrain.search.keep import kept, pack, unpack, write_whole


class Pair(NamedTuple):
    left: Any
    right: Any


dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
leaves = st.builds(
    lambda dtype, shape, start: (torch.arange(math.prod(shape)) + start).reshape(shape).to(dtype),
    st.sampled_from(dtypes),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 5),
)
trees = st.recursive(
    st.one_of(leaves, st.none()),
    lambda inner: st.one_of(
        st.dictionaries(st.one_of(st.sampled_from(["w", "é", "named", "dict"]), st.integers(0, 2)), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=6,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a is None and b is None


@settings(max_examples=80, deadline=None)
@given(trees)
def test_states_come_back_as_they_were(state: Any) -> None:
    packed = unpack(pack(state, {"about": "é"}))
    assert same(packed.state, state)
    assert packed.texts == {"about": "é"}
    assert same(kept(state), state)


def test_a_state_of_a_step_comes_back_as_a_state() -> None:
    step = ft.step(ft.grad(lambda params, batch: (batch - params["m"]) ** 2), ft.optim.adam(ft.optim.cosine(0.1, 9)))
    state, _ = step(step.init({"m": torch.tensor(0.5)}), torch.ones(3))
    again = unpack(pack(state)).state
    assert type(again) is type(state)
    assert type(again.opt) is type(state.opt)
    one, _ = step(state, torch.ones(3))
    two, _ = step(again, torch.ones(3))
    assert torch.equal(one.params["m"], two.params["m"])


def test_views_graphs_and_shared_memory_are_values() -> None:
    base = torch.arange(6.0, requires_grad=True)
    state = {"row": (base * 2)[::2], "twice": base, "again": base, "turned": torch.eye(3)[:2].t()}
    again = unpack(pack(OrderedDict(state))).state
    assert same(again, {name: leaf.detach() for name, leaf in state.items()})
    own = kept(state)
    with torch.no_grad():
        base.zero_()
    assert own["twice"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not own["twice"].requires_grad


def test_a_class_that_is_not_there_becomes_one_of_the_same_fields() -> None:
    class Local(NamedTuple):
        here: torch.Tensor

    again = unpack(pack(Local(torch.ones(1)))).state
    assert type(again).__name__ == "Local"
    assert again.here.tolist() == [1.0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": 3}, "w is int"),
        ([torch.zeros(1), {"deep": {1, 2}}], "1.deep is set"),
        ({(1, 2): torch.zeros(1)}, "keys that are neither text nor ints"),
        ({1: torch.zeros(1), "1": torch.zeros(1)}, "two leaves would have the name '1'"),
        ({"w": torch.zeros(1, device="meta")}, "'w' is on the meta device"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is of layout torch.sparse_coo"),
        ({"\ud800": torch.zeros(1)}, "not valid text"),
    ],
)
def test_what_cannot_be_kept_is_said(state: Any, message: str) -> None:
    for keep in (pack, kept):
        with pytest.raises(TreeError, match=message):
            keep(state)


def test_names_that_the_format_keeps_for_itself_and_dtypes_that_it_does_not_know() -> None:
    state = {
        "__metadata__": torch.ones(2),
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "a.b": torch.tensor([[1 + 2j]], dtype=torch.complex128),
        "0-d": torch.tensor(3j, dtype=torch.complex128),
        "none": torch.zeros(0, 2, dtype=torch.complex128),
        "turned": torch.arange(6).reshape(2, 3).to(torch.complex128).t(),
    }
    assert same(unpack(pack(state)).state, state)
    assert same(kept(state), state)
    assert same(unpack(pack(torch.tensor(2j, dtype=torch.complex128))).state, torch.tensor(2j, dtype=torch.complex128))


def test_damaged_bytes_name_their_origin(tmp_path: Path) -> None:
    whole = pack({"w": torch.arange(4)})
    for data in (b"", whole[:7], whole[:40], whole[:-1], whole.replace(b"structure", b"structura")):
        with pytest.raises(RunError, match=r"could not read best\.safetensors"):
            unpack(data, "best.safetensors")


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    path = tmp_path / "best"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]
    with pytest.raises(RunError, match="could not write"):
        write_whole(tmp_path / "missing" / "best", b"new")
