"""Memory of the parts of a batch: where it lies, and what is done when there is not enough."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

# By the host's allocator, C++, a thread that needs a stack, and the libraries that keep workspaces of their own on a device.
_TOLD = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
    "STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on a device or on the host.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("a size is wrong"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TOLD)


_LASTING = {"threads": "workers={half}", "vmap": 'how="loop"', "fused": 'how="loop"'}
_TOO_LARGE = (
    "one part alone does not fit into memory: take more parts or a smaller batch, or compute intermediate values again "
    "(ft.remat)"
)


def fewer(alive: int, how: str, error: BaseException) -> int:
    """Half as many parts alive at once, after a warning; the error itself, with a note, when there is nothing left to halve."""
    if alive == 1:
        if _TOO_LARGE not in getattr(error, "__notes__", ()):
            error.add_note(_TOO_LARGE)
        raise error
    half = (alive + 1) // 2
    advice = f"take {_LASTING.get(how, 'more parts').format(half=half)} or a smaller batch to be rid of this warning"
    warnings.warn(f"out of memory with {alive} parts alive ({how}): {half} from now on; {advice}", RuntimeWarning, 4)
    return half


# Bytes: what torch gives tensors of their own on the CPU.
_ALIGNED = 64


def like_its_own(leaf: Any) -> Any:
    """A part's rows as they would lie in memory of their own: contiguous, at an aligned address; copied where they do not.

    What a kernel rounds may depend on the address: of products `(n, 7) @ (7, 1)`, half came out with other bits where
    rows began at an odd multiple of 4 or 8 bytes (MKL, float32 and float64), as parts cut from a batch do.

    >>> part = torch.zeros(5, 7)[1:]
    >>> part.data_ptr() % 64, like_its_own(part).data_ptr() % 64, like_its_own(part).shape
    (28, 0, torch.Size([4, 7]))
    """
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        # Whoever uses it says what is wrong with it.
        return leaf
    if not (leaf.is_contiguous() or (leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last))):
        leaf = leaf.contiguous()
    return leaf.clone() if leaf.data_ptr() % _ALIGNED else leaf
