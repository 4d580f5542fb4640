"""What a run puts on disk, whole or not at all: trees as safetensors files, records as JSON."""

from __future__ import annotations

import fcntl
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
from functrain.core.tree import Tree
from functrain.data import atomic

# What the safetensors format has a code for (complex128, for one, it has not).
_STORABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)


# --- whole files, one writer --------------------------------------------------------------------------------


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` in one move, or never; `RunError` when it cannot be written."""
    try:
        with atomic.whole_file(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise RunError(f"could not write {path}: {error}") from error


@contextmanager
def sole_writer(path: str | os.PathLike[str], wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for the block; it is free again when the process ends, in whatever way.

    Raises `RunError` when another process (or another thread of this one) holds it, unless told to `wait`.
    """
    handle = _lock(Path(path), wait)
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path, wait: bool) -> int:
    handle = -1
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        return handle
    except BlockingIOError as error:
        holder = os.pread(handle, 80, 0).decode("ascii", "replace") or "unknown"
        os.close(handle)
        raise RunError(
            f"{path.parent} is in use by another process (id {holder}), which holds {path.name}: "
            "wait for it, stop it, or choose another directory"
        ) from error
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        raise RunError(f"could not lock {path}: {error}") from error


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


def _name(accessor: Any) -> str:
    keys = [str(getattr(entry, "field", entry.entry)) for entry in accessor]
    name = "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)
    # An escaped key never has "~" before "_" or at its end, so these two cannot meet another name.
    return "~" if not keys else "~__metadata__" if name == "__metadata__" else name


def named_leaves(tree: Tree) -> dict[str, Tensor]:
    """The leaves of `tree` by the name they have in a file: keys joined by "/", escaped as in a JSON pointer.

    Raises `TreeError` for leaves that are not tensors, and for keys that have the same text (`1` and `"1"`).

    >>> list(named_leaves({"a/b": torch.zeros(1), "c": [torch.zeros(2), None, torch.zeros(3)]}))
    ['a~1b', 'c/0', 'c/2']
    """
    named: dict[str, Tensor] = {}
    for accessor, leaf in zip(optree.tree_accessors(tree), trees.leaves(tree)):
        name = _name(accessor)
        if not isinstance(leaf, Tensor):
            raise TreeError(f"leaf {name!r} is {type(leaf).__name__}: all leaves to store must be tensors")
        if name in named:
            raise TreeError(f"two leaves would have the name {name!r}: rename one of the keys")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise TreeError(f"leaf {name!r} has a key that is not valid text: rename it") from error
        named[name] = leaf
    return named


def _dense(name: str, leaf: Tensor) -> Tensor:
    """The values of `leaf` in memory in the order of its indices, outside of any graph."""
    if leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
        kind = "on the meta device" if leaf.is_meta else f"of layout {leaf.layout}"
        raise TreeError(f"leaf {name!r} is {kind}: expected a dense tensor with values")
    # A conjugate or negative view has a flag where its bytes are read as the values themselves.
    return leaf.detach().resolve_conj().resolve_neg().contiguous()


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
        dense = _dense(name, leaf).cpu()
        # A view of one element counts as contiguous whatever its stride, but not as bytes.
        flat = dense.as_strided((dense.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tree(path: str | os.PathLike[str], tree: Tree, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of tensors, and text `metadata` about it, to one safetensors file, whole or not at all.

    Every dtype that the format knows is kept exactly, and so are 0-d and empty tensors; views are written as
    the values they show. Raises `TreeError` for a leaf that cannot be stored, `RunError` when writing fails.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, leaf in named_leaves(tree).items():
        if leaf.dtype not in _STORABLE:
            raise TreeError(f"leaf {name!r} is {leaf.dtype}, which safetensors cannot hold: convert it first")
        dense = _dense(name, leaf)
        memory = dense.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; a tree may well hold one tensor twice.
        stored[name] = dense.clone() if memory in seen else dense
        seen.add(memory)
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ArgumentError(f"metadata {key!r} is {text!r}: expected text for text")
    with whole_file(path) as temporary:
        save_file(stored, temporary, dict(metadata) if metadata else None)


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
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise RunError(f"could not read {path} as a safetensors file: {error}") from error


def _kind(leaf: Tensor | None) -> str:
    return "nothing" if leaf is None else f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def load_tree(path: str | os.PathLike[str], like: Tree) -> Tree:
    """The tree in a safetensors file, in the structure of `like` and on the devices of its leaves.

    The tensors are new and belong to no graph; leaves of `like` on the meta device are loaded to the CPU.
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
    loaded = [got[name] if leaf.is_meta else got[name].to(leaf.device) for name, leaf in expected.items()]
    return trees.unflatten(trees.structure(like), loaded)
