"""Gradient noise that fades: a way out of flat beginnings and poor minima.

    g ← g + √(η / (1 + t)^γ) · N(0, I),   t the number of updates before this one

Source: Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens, "Adding gradient noise improves learning for very deep
networks", arXiv:1511.06807, 2015.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from functrain.core import random
from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.part import part, wide


def noise(eta: Hyper, *, gamma: Hyper = 0.55) -> Optimizer:
    """Gaussian noise of variance η / (1 + t)^γ on every element; the paper tries η of 0.01, 0.3 and 1.

    The noise is keyed: `update(grads, state, params, key=key)`, and a step hands in a key of each position, so that a run is
    the same again however it is run. It is drawn in float32 or better. `eta` and `gamma` are numbers of at least 0 or
    schedules (else `ArgumentError`).

    >>> import functrain as ft
    >>> part = noise(1.0)
    >>> params = torch.zeros(1000)
    >>> updates, _ = part.update(torch.zeros(1000), part.init(params), params, key=ft.random.key(0))
    >>> bool((updates.std() - 1).abs() < 0.1)
    True
    """

    def rule(grads: list[Tensor], params: list[Tensor], now: dict[str, Tensor], *, key: Tensor) -> list[Tensor]:
        if not grads:
            return []
        variance = now["eta"] / (1.0 + now["steps"]) ** now["gamma"]
        # With a derivative of 0 where there is no noise, where that of the root is infinite.
        deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        widest = functools.reduce(torch.promote_types, (leaf.dtype for leaf in grads), torch.float32)
        # At once, for all leaves: one by one, six small ones took three times as long.
        sizes = [leaf.numel() for leaf in grads]
        drawn = (deviation.to(widest) * random.normal(key, (sum(sizes),), widest)).split(sizes)
        return [(wide(leaf) + one.view(leaf.shape)).to(leaf.dtype) for leaf, one in zip(grads, drawn)]

    settings = {"eta": checked("eta", eta), "gamma": checked("gamma", gamma)}
    return part("noise", settings, rule, uses=frozenset({"key"}))
