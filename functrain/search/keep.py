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

_STRUCTURE = "structure"


class Packed(NamedTuple):
    """A state with the texts that were packed beside it."""

    state: Tree
    texts: dict[str, str]


def pack(state: Tree, texts: Mapping[str, str] | None = None) -> bytes:
    """A tree of tensors (in dicts, lists, tuples, NamedTuples, None) as one safetensors file in memory.

    Raises `TreeError` for other leaves and containers, and for dtypes that safetensors cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    structure = _described(state, (), tensors)
    try:
        return save(tensors, {_STRUCTURE: json.dumps(structure), **(texts or {})})
    except (SafetensorError, KeyError, ValueError) as error:
        raise TreeError(f"safetensors cannot hold this state ({error}): convert its leaves to a common dtype") from error


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
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
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
        return _leaf(node, ".".join(path) or "state", tensors)
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


def _leaf(leaf: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    if leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
        raise TreeError(f"leaf {name!r} is no dense tensor with values (layout {leaf.layout}, device {leaf.device})")
    if name in tensors:
        raise TreeError(f"two leaves have the name {name!r}: rename a key that holds '.'")
    # A copy: safetensors refuses tensors that share memory, and a member's leaves are views of its whole
    # population.
    tensors[name] = leaf.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    return name


def _built(node: Any, tensors: dict[str, Tensor]) -> Any:
    if node is None:
        return None
    if isinstance(node, str):
        return tensors[node]
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
