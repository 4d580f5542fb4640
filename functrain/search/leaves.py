"""Leaves of trees as a safetensors file holds them: each under a name of its own, its values in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from functrain.core.errors import TreeError

# What the safetensors format has a code for (complex128, for one, it has not).
STORABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)


def leaf_name(keys: Iterable[Any], taken: Iterable[str] = ()) -> str:
    """The name of the leaf under `keys`: their text, joined by "/" and escaped as in a JSON pointer.

    Raises `TreeError` for a name that is `taken` (keys of the same text, such as `1` and `"1"`) or no valid text.

    >>> leaf_name(["a/b", 0]), leaf_name([])
    ('a~1b/0', '~')
    """
    texts = [str(key) for key in keys]
    name = "/".join(text.replace("~", "~0").replace("/", "~1") for text in texts)
    # An escaped key never has "~" before "_" or at its end, so these two cannot meet another name.
    name = "~" if not texts else "~__metadata__" if name == "__metadata__" else name
    if name in taken:
        raise TreeError(f"two leaves would have the name {name!r}: rename one of the keys")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise TreeError(f"leaf {name!r} has a key that is not valid text: rename it") from error
    return name


def dense(name: str, leaf: Tensor) -> Tensor:
    """The values of `leaf` in memory in the order of its indices, outside of any graph; `TreeError` where it has none."""
    if leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
        kind = "on the meta device" if leaf.is_meta else f"of layout {leaf.layout}"
        raise TreeError(f"leaf {name!r} is {kind}: expected a dense tensor with values")
    # A conjugate or negative view has a flag where its bytes are read as the values themselves.
    return leaf.detach().resolve_conj().resolve_neg().contiguous()


def raw(values: Tensor) -> Tensor:
    """The bytes `(B,)` of a `dense` tensor, in the same memory."""
    # A view of one element counts as contiguous whatever its stride, but not as bytes.
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8)
