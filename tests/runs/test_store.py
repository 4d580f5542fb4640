"""Trees and records on disk: what is written is what is read, or an error that says what is wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, FunctrainError, RunError, TreeError
from functrain.runs.store import (
    hash_tree,
    jsonable,
    load_metadata,
    load_named,
    load_tree,
    read_record,
    save_tree,
    whole_file,
    write_record,
)
from functrain.search.lock import sole_writer

Pair = namedtuple("Pair", ["left", "right"])


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


AWKWARD = {
    "bfloat16": torch.tensor([1.0, float("nan"), -0.0]).bfloat16(),
    "bool": torch.tensor([[True], [False]]),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "0-d": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3, dtype=torch.int32),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "every other": torch.arange(6)[::2],
    "expanded": torch.tensor([7.0]).expand(4),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative view": torch.tensor([1 + 2j]).conj().imag,
    "nan payload": torch.tensor([0x7FC00123, 0x7F800001], dtype=torch.int32).view(torch.float32),
    "one of a stride": torch.arange(4.0)[1::4],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "float8": torch.tensor([0.5, 1.0]).to(torch.float8_e4m3fn),
    "uint64": torch.tensor([2**63 - 1], dtype=torch.int64).to(torch.uint64),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_tensors_come_back_with_the_same_bits(tmp_path: Path, name: str) -> None:
    save_tree(tmp_path / "t", {"x": AWKWARD[name]})
    loaded = load_tree(tmp_path / "t", {"x": AWKWARD[name]})["x"]
    shown = AWKWARD[name].detach().resolve_conj().resolve_neg()
    assert same_bits(loaded, shown)
    assert not loaded.requires_grad
    assert hash_tree({"x": loaded}) == hash_tree({"x": AWKWARD[name]})


STRIDED = {
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "channels last of one channel": torch.arange(9.0).reshape(1, 1, 3, 3).to(memory_format=torch.channels_last),
    "transposed": torch.arange(6).reshape(2, 3).t(),
    "with gaps": torch.arange(24.0).reshape(2, 3, 4)[:, -1],
    "one of a stride": torch.arange(4.0)[1::4],
    "empty": torch.zeros(0, 3).t(),
    "in order": torch.arange(6.0).reshape(2, 3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_how_a_tensor_lies_in_memory_comes_back(tmp_path: Path, name: str) -> None:
    leaf = STRIDED[name]
    save_tree(tmp_path / "t", {"x": leaf}, {"made by": "a test"})
    for like in (leaf, torch.empty(leaf.shape, dtype=leaf.dtype), torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")):
        loaded = load_tree(tmp_path / "t", {"x": like})["x"]
        assert loaded.stride() == leaf.stride()
        assert same_bits(loaded, leaf)
    assert load_metadata(tmp_path / "t") == {"made by": "a test"}


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tree = {"a": base, "b": base, "c": base[2:4], "d": Pair(base.view(2, 3), None)}
    save_tree(tmp_path / "t", tree)
    loaded = load_tree(tmp_path / "t", tree)
    loaded["a"].zero_()
    assert torch.equal(loaded["b"], base)
    assert torch.equal(loaded["c"], base[2:4])
    assert isinstance(loaded["d"], Pair)
    assert torch.equal(loaded["d"].left, base.view(2, 3))


def test_loaded_tensors_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_tree(path, {"x": torch.arange(1000)})
    before = path.read_bytes()
    loaded = load_named(path)["x"]
    with open(path, "r+b") as file:
        file.write(bytes(len(before)))
    assert torch.equal(loaded, torch.arange(1000))
    save_tree(path, {"x": torch.arange(1000)})
    load_named(path)["x"].zero_()
    assert path.read_bytes() == before


def test_names_that_look_alike_do_not_collide(tmp_path: Path) -> None:
    keys = ["a/b", "a~1b", "a~b", "~", "", "__metadata__", "~__metadata__", "ä\0 b", "~0"]
    tree = {key: torch.tensor(place) for place, key in enumerate(keys)}
    tree["a"] = {"b": torch.tensor(100)}
    tree["__metadata__ "] = {"__metadata__": torch.tensor(101)}
    save_tree(tmp_path / "t", tree)
    loaded = load_tree(tmp_path / "t", tree)
    assert [int(loaded[key]) for key in keys] == list(range(len(keys)))
    assert int(loaded["a"]["b"]) == 100


def test_a_single_tensor_and_no_tensor_are_trees(tmp_path: Path) -> None:
    save_tree(tmp_path / "one", torch.tensor(2))
    assert load_tree(tmp_path / "one", torch.tensor(0)).item() == 2
    save_tree(tmp_path / "none", {"a": None, "b": []})
    assert load_tree(tmp_path / "none", {"a": None, "b": []}) == {"a": None, "b": []}


def test_keys_of_the_same_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match="two leaves would have the name '1'"):
        save_tree(tmp_path / "t", {1: torch.zeros(1), "1": torch.zeros(1)})
    with pytest.raises(TreeError, match="not valid text"):
        save_tree(tmp_path / "t", {"\ud800": torch.zeros(1)})


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (3.0, "leaf 'a/0' is float"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_leaves_that_cannot_be_stored_are_named(tmp_path: Path, leaf: object, says: str) -> None:
    with pytest.raises(TreeError, match=says):
        save_tree(tmp_path / "t", {"a": [leaf]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("like", "says"),
    [
        ({"w": torch.zeros(3), "b": torch.zeros(1)}, r"'w': expected float32 \(3,\), got float32 \(2,\)"),
        (
            {"w": torch.zeros(2).long(), "b": torch.zeros(1)},
            r"'w': expected int64 \(2,\), got float32 \(2,\)",
        ),
        ({"w": torch.zeros(2)}, r"'b': expected nothing, got float32 \(1,\)"),
        (dict.fromkeys("wbc", torch.zeros(1)), r"'c': expected float32 \(1,\), got nothing"),
    ],
)
def test_another_tree_than_asked_for_is_an_error(tmp_path: Path, like: dict[str, Tensor], says: str) -> None:
    save_tree(tmp_path / "t", {"w": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(TreeError, match=says):
        load_tree(tmp_path / "t", like)


def test_a_template_on_the_meta_device_loads_to_the_cpu(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"w": torch.ones(2)})
    loaded = load_tree(tmp_path / "t", {"w": torch.ones(2, device="meta")})
    assert loaded["w"].tolist() == [1.0, 1.0]


def test_metadata_comes_back_and_has_to_be_text(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"w": torch.ones(2)}, {"made by": "a test", "ü": ""})
    assert load_metadata(tmp_path / "t") == {"made by": "a test", "ü": ""}
    assert list(load_named(tmp_path / "t")) == ["w"]
    with pytest.raises(ArgumentError, match="expected text"):
        save_tree(tmp_path / "t", {}, {"epoch": 3})  # type: ignore[dict-item]


def test_every_cut_of_a_file_is_found_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_tree(path, {"w": torch.arange(20), "b": torch.ones(3)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(RunError, match="weights"):
            load_named(path)
    for other in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RunError, match="could not read"):
            load_named(other)
        with pytest.raises(RunError, match="could not read"):
            load_metadata(other)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_tree(path, {"w": torch.ones(1)})

    def interrupted() -> None:
        with whole_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == [path]
    assert load_named(path)["w"].item() == 1
    with pytest.raises(RunError, match="could not write"):
        save_tree(tmp_path / "missing" / "t", {"w": torch.ones(1)})


def test_the_hash_sees_names_dtypes_shapes_and_bits() -> None:
    trees = [
        {"a": torch.zeros(2, 2)},
        {"b": torch.zeros(2, 2)},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0.0], [0.0, -0.0]])},
        {"a": torch.zeros(2, 2), "b": torch.zeros(0)},
        {"a": {"b": torch.zeros(2, 2)}},
        {"a/b": torch.zeros(2, 2)},
    ]
    assert len({hash_tree(tree) for tree in trees}) == len(trees)
    one, two = torch.ones(1), torch.ones(2)
    assert hash_tree({"a": one, "b": two}) == hash_tree({"b": two, "a": one})


def test_records_hold_what_json_holds(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, {"a": torch.tensor(2), "b": (1, [2.5, None]), "ü": "\ud800", "c": -math.inf})
    assert read_record(path) == {"a": 2, "b": [1, [2.5, None]], "ü": "\ud800", "c": "-inf"}
    with pytest.raises(ArgumentError, match=r"record\['a'\]\[1\] is object"):
        jsonable({"a": [1, object()]})
    with pytest.raises(ArgumentError, match="text keys only"):
        jsonable({1: 2})
    for damaged in ("", "{", "[1]", '{"a": 1'):
        (tmp_path / "r.json").write_text(damaged)
        with pytest.raises(RunError, match=r"r\.json"):
            read_record(tmp_path / "r.json")


def test_one_writer_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    hold = f"""
import time
from functrain.search.lock import sole_writer
with sole_writer({os.fspath(lock)!r}):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(RunError, match=f"another process .id {holder.pid}."), sole_writer(lock):
                pass
        finally:
            holder.kill()
    with sole_writer(lock), pytest.raises(FunctrainError, match="in use"), sole_writer(lock):
        pass
    with sole_writer(lock):
        pass
