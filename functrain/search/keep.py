"""States as bytes, to be sent or kept in a file: safetensors, with the structure of the tree beside."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from functrain.core.errors import RunError, TreeError
from functrain.core.tree import Tree
from functrain.data.atomic import whole_file
from functrain.search.leaves import STORABLE, dense, leaf_name, raw

_STRUCTURE = "structure"


class Packed(NamedTuple):
    """A state with the texts that were packed beside it."""

    state: Tree
    texts: dict[str, str]


def pack(state: Tree, texts: Mapping[str, str] | None = None) -> bytes:
    """A tree of tensors (in dicts, lists, tuples, NamedTuples, None) as one safetensors file in memory.

    What the format has no dtype for is kept as bytes. Raises `TreeError` for other leaves and containers.
    """
    tensors: dict[str, Tensor] = {}
    structure = _described(state, (), tensors)
    return save(tensors, {_STRUCTURE: json.dumps(structure), **(texts or {})})


def unpack(data: bytes, origin: str = "the packed state") -> Packed:
    """What was packed, in its structure, on the CPU; raises `RunError`, naming the origin, for damage.

    NamedTuples come back as their own class where its module is loaded, else as one of the same name and
    fields.

    >>> unpack(pack({"w": torch.arange(2), "rest": (None, [torch.tensor(True)])})).state
    {'w': tensor([0, 1]), 'rest': (None, [tensor(True)])}
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        texts = dict(header["__metadata__"])
        tensors = load(data)
        state = _built(json.loads(texts.pop(_STRUCTURE)), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(f"could not read {origin} as a packed state: {error}") from error
    return Packed(state, texts)


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one move, on the disk itself: a reader sees the old file or the new one.

    Raises `RunError` when it cannot be written.
    """
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise RunError(f"could not write {path}: {error}") from error


def kept(state: Tree) -> Tree:
    """The state on the CPU, in memory of its own; raises `TreeError` where it could not be packed."""
    tensors: dict[str, Tensor] = {}
    structure = _described(state, (), tensors)
    return _built(structure, tensors)


# --- structure ---


def _described(node: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if node is None:
        return None
    if isinstance(node, Tensor):
        return _leaf(node, leaf_name(path, tensors), tensors)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        kind = f"{type(node).__module__}:{type(node).__qualname__}"
        children = [_described(child, (*path, name), tensors) for name, child in zip(node._fields, node)]
        return {"named": kind, "fields": list(node._fields), "items": children}
    if isinstance(node, Mapping):
        if not all(type(key) in (str, int) for key in node):
            raise TreeError(f"{'.'.join(path) or 'the state'} has keys that are neither text nor ints: rename them")
        return {"dict": [[key, _described(child, (*path, str(key)), tensors)] for key, child in node.items()]}
    if isinstance(node, (tuple, list)):
        children = [_described(child, (*path, str(place)), tensors) for place, child in enumerate(node)]
        return {"tuple" if isinstance(node, tuple) else "list": children}
    raise TreeError(
        f"{'.'.join(path) or 'the state'} is {type(node).__name__}: a state to keep is a tree of tensors "
        "in dicts, lists, tuples and NamedTuples"
    )


def _leaf(leaf: Tensor, name: str, tensors: dict[str, Tensor]) -> Any:
    # A copy: safetensors refuses tensors that share memory, and a member's leaves are views of its whole
    # population.
    values = dense(name, leaf).cpu().clone(memory_format=torch.contiguous_format)
    if leaf.dtype in STORABLE:
        tensors[name] = values
        return name
    tensors[name] = raw(values)
    return {"bytes": name, "dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape)}


def _built(node: Any, tensors: dict[str, Tensor]) -> Any:
    if node is None:
        return None
    if isinstance(node, str):
        return tensors[node]
    if "bytes" in node:
        return tensors[node["bytes"]].view(getattr(torch, node["dtype"])).reshape(node["shape"])
    if "dict" in node:
        return {key: _built(child, tensors) for key, child in node["dict"]}
    if "named" in node:
        return _class(node["named"], node["fields"])._make(_built(child, tensors) for child in node["items"])
    children = [_built(child, tensors) for child in node.get("tuple", node.get("list"))]
    return tuple(children) if "tuple" in node else children


def _class(kind: str, fields: list[str]) -> Any:
    # Only a NamedTuple of a module that the program has loaded itself: a file must not make it import
    # anything.
    module, _, path = kind.partition(":")
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    if isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == tuple(fields):
        return found
    return namedtuple(path.rpartition(".")[2], fields)
