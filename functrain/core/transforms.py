"""Where code is running: inside a torch.func transform, or under the eye of a compiler."""

from __future__ import annotations

import torch
from torch import Tensor


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) surrounds the caller.

    >>> inside_transform(), bool(torch.func.vmap(lambda x: x + inside_transform())(torch.zeros(1)))
    (False, True)
    """
    return torch._C._functorch.maybe_current_level() is not None


def inside_tracing() -> bool:
    """Whether the caller is being traced by torch.compile, torch.export or `make_fx`."""
    return torch.compiler.is_compiling() or torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None


def computed_once(value: Tensor) -> Tensor:
    """`value`, which a compiler is to compute once and store, not again wherever it is used.

    Every round of a hash uses its input twice, so a chain of hashes that a compiler inlines into its consumers grows as
    2ⁿ: inductor took 32 s over a small network with one dropout layer, and 19 s with this (18 s without dropout).
    """
    if not inside_tracing():
        return value
    # Inductor stores what a strided view is taken of.
    return value.as_strided(value.shape, value.stride())
