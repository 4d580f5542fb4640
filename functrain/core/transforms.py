"""Where code is running: inside a torch.func transform, or under the eye of a compiler."""

from __future__ import annotations

import torch


def inside_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) surrounds the caller.

    >>> inside_transform(), bool(torch.func.vmap(lambda x: x + inside_transform())(torch.zeros(1)))
    (False, True)
    """
    return torch._C._functorch.maybe_current_level() is not None


def inside_tracing() -> bool:
    """Whether the caller is being traced by torch.compile, torch.export or `make_fx`."""
    return torch.compiler.is_compiling() or torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None
