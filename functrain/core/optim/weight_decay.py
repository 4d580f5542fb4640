"""Weight decay as torch.optim has it: within the gradient, or apart from it."""

from __future__ import annotations

from functrain.core.optim.arithmetic import Arithmetic, Leaf
from functrain.core.optim.base import Hyper, Settings, checked
from functrain.core.optim.leafwise import Numbers


def decay_settings(weight_decay: Hyper) -> Settings:
    """The setting of a weight decay; none for 0, so that it costs nothing."""
    return {} if weight_decay == 0.0 else {"weight_decay": checked("weight_decay", weight_decay)}


def decayed(do: Arithmetic, p: Leaf, g: Leaf, n: Numbers, *, decoupled: bool = False) -> Leaf:
    """The gradient with the decay in it, g + weight_decay · p; or, decoupled, g itself and p ← p − lr · weight_decay · p."""
    if "weight_decay" not in n:
        return g
    if not decoupled:
        return do.add(g, p, n["weight_decay"])
    do.decay(n["lr"] * n["weight_decay"])
    return g
