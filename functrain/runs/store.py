"""What a run puts on disk, whole or not at all: trees as safetensors files, records as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from functrain.core import tree as trees
from functrain.core.errors import ArgumentError, RunError, TreeError
from functrain.core.step import check_owned
from functrain.core.tree import Tree
from functrain.data import atomic
from functrain.search.leaves import STORABLE, dense, leaf_name, raw

# --- whole files --------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` in one move, or never; `RunError` when it cannot be written."""
    try:
        with atomic.whole_file(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise RunError(f"could not write {path}: {error}") from error


# --- records ------------------------------------------------------------------------------------------------


def jsonable(value: Any, name: str = "record") -> Any:
    """`value` as JSON has it: 0-d tensors and arrays as numbers, tuples as lists, nan and ±inf as text.

    Raises `ArgumentError` naming the place of anything that JSON cannot hold.

    >>> jsonable({"loss": torch.tensor(0.5), "worst": math.inf, "shape": (2, 3)})
    {'loss': 0.5, 'worst': 'inf', 'shape': [2, 3]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                kind = type(key).__name__
                raise ArgumentError(f"{name} has the key {key!r} ({kind}): JSON has text keys only")
        return {str(key): jsonable(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item, f"{name}[{place}]") for place, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return jsonable(value.item(), name)
    raise ArgumentError(
        f"{name} is {type(value).__name__}, which JSON cannot hold: "
        "expected numbers, text, None, lists or dicts of them"
    )


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def with_numbers(value: Any) -> Any:
    """What `jsonable` made of a value, with the texts "nan", "inf" and "-inf" as the numbers that they were.

    >>> with_numbers({"loss": "inf", "note": "fine"})
    {'loss': inf, 'note': 'fine'}
    """
    if isinstance(value, dict):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` to the JSON file `path`, whole or not at all."""
    text = json.dumps(jsonable(record, path.stem), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogatepass") + b"\n")


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; raises `RunError` when it is missing, damaged or no object."""
    try:
        record = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"could not read {path}: {error}") from error
    if not isinstance(record, dict):
        raise RunError(f"{path} is damaged: expected a JSON object, got {type(record).__name__}")
    return record


# --- trees --------------------------------------------------------------------------------------------------


# The name, in a file's metadata, of how the leaves lay in memory that did not lie in order.
_STRIDES = "functrain.strides"


def named_leaves(tree: Tree) -> dict[str, Tensor]:
    """The leaves of `tree` by the name they have in a file: keys joined by "/", escaped as in a JSON pointer.

    Raises `TreeError` for leaves that are not tensors, and for keys that have the same text (`1` and `"1"`).

    >>> list(named_leaves({"a/b": torch.zeros(1), "c": [torch.zeros(2), None, torch.zeros(3)]}))
    ['a~1b', 'c/0', 'c/2']
    """
    named: dict[str, Tensor] = {}
    for accessor, leaf in zip(optree.tree_accessors(tree), trees.leaves(tree)):
        name = leaf_name((getattr(entry, "field", entry.entry) for entry in accessor), named)
        if not isinstance(leaf, Tensor):
            raise TreeError(f"leaf {name!r} is {type(leaf).__name__}: all leaves to store must be tensors")
        named[name] = leaf
    return named


def hash_tree(tree: Tree) -> str:
    """The SHA-256 of a tree of tensors: over names, dtypes, shapes and bytes, so equal for equal bits alone.

    >>> hash_tree({"w": torch.zeros(2)}) == hash_tree({"w": torch.zeros(2)})
    True
    >>> hash_tree({"w": torch.zeros(2)}) == hash_tree({"w": -torch.zeros(2)})
    False
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(raw(dense(name, leaf).cpu()).numpy().data)
    return digest.hexdigest()


def save_tree(path: str | os.PathLike[str], tree: Tree, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of tensors, and text `metadata` about it, to one safetensors file, whole or not at all.

    Every dtype that the format knows is kept exactly, and so are 0-d and empty tensors; views are written as
    the values they show. How a leaf lies in memory (its strides) is kept beside, as kernels may add up in another
    order for it. Raises `TreeError` for a leaf that cannot be stored, `DonatedError` for a state that was
    given away, `RunError` when writing fails.
    """
    if isinstance(getattr(tree, "position", None), Tensor):
        check_owned(tree)
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    strides: dict[str, list[int]] = {}
    for name, leaf in named_leaves(tree).items():
        if leaf.dtype not in STORABLE:
            raise TreeError(f"leaf {name!r} is {leaf.dtype}, which safetensors cannot hold: convert it first")
        values = dense(name, leaf)
        memory = values.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; a tree may well hold one tensor twice.
        stored[name] = values.clone() if memory in seen else values
        seen.add(memory)
        if leaf.stride() != _in_order(leaf) and _apart(leaf):
            strides[name] = list(leaf.stride())
    texts = dict(metadata or {})
    for key, text in texts.items():
        if not isinstance(key, str) or not isinstance(text, str) or key == _STRIDES:
            raise ArgumentError(f"metadata {key!r} is {text!r}: expected text for text, under another name than {_STRIDES!r}")
    if strides:
        texts[_STRIDES] = json.dumps(strides)
    with whole_file(path) as temporary:
        save_file(stored, temporary, texts or None)


def _in_order(leaf: Tensor) -> tuple[int, ...]:
    return torch.empty(leaf.shape, device="meta").stride()


def _apart(leaf: Tensor) -> bool:
    """Whether each element has a place in memory of its own: a new tensor can then be laid out, and written, alike."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(leaf.stride(), leaf.shape) if size > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def load_named(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, in memory of their own, on the CPU.

    Raises `RunError` naming the file when it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # What safetensors hands out is a view of the mapped file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(f"could not read {path} as a safetensors file: {error}") from error


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text about the tree that `save_tree` was given."""
    return {key: text for key, text in _texts(path).items() if key != _STRIDES}


def _texts(path: str | os.PathLike[str]) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise RunError(f"could not read {path} as a safetensors file: {error}") from error


def _kind(leaf: Tensor | None) -> str:
    return "nothing" if leaf is None else f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def load_tree(path: str | os.PathLike[str], like: Tree) -> Tree:
    """The tree in a safetensors file, in the structure of `like` and on the devices of its leaves.

    The tensors are new, lie in memory as the saved ones did, and belong to no graph; leaves of `like` on the meta
    device are loaded to the CPU.
    Raises `TreeError` naming every leaf (up to five) whose name, shape or dtype is not that in `like`, and
    `RunError` when the file is missing or damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/t.safetensors", {"w": torch.arange(2), "scale": (None, torch.tensor(3.0))})
    ...     load_tree(f"{folder}/t.safetensors", {"w": torch.arange(2), "scale": (None, torch.tensor(0.0))})
    {'w': tensor([0, 1]), 'scale': (None, tensor(3.))}
    """
    expected, got = named_leaves(like), load_named(path)
    wrong = [
        f"{name!r}: expected {_kind(expected.get(name))}, got {_kind(got.get(name))}"
        for name in [*expected, *(name for name in got if name not in expected)]
        if _kind(expected.get(name)) != _kind(got.get(name))
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise TreeError(f"{path} holds another tree than asked for: {'; '.join(wrong[:5])}{more}")
    strides = json.loads(_texts(path).get(_STRIDES, "{}"))
    loaded = []
    for name, leaf in expected.items():
        values = got[name] if leaf.is_meta else got[name].to(leaf.device)
        if name in strides:
            values = torch.empty_strided(values.shape, strides[name], dtype=values.dtype, device=values.device).copy_(values)
        loaded.append(values)
    return trees.unflatten(trees.structure(like), loaded)
