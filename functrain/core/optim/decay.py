"""Weight decay as a part of its own, before an optimizer or after it.

    before, part of the gradient (L2):      g ← g + weight_decay · p
    after, apart from it (decoupled):       u ← u − weight_decay · p,   p ← p + u

Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
"""

from __future__ import annotations

from torch import Tensor

from functrain.core.optim.base import Hyper, Optimizer, checked
from functrain.core.optim.part import part, wide, width
from functrain.core.optim.partition import masked
from functrain.core.optim.selection import Where


def decay(weight_decay: Hyper, where: Where | None = None, *, decoupled: bool = False) -> Optimizer:
    """Parameters drawn towards zero: all of them, or those whose path `where` selects (as in `masked`).

    - Before an optimizer it adds the gradient of weight_decay/2 · ‖p‖²: `chain(decay(0.1), sgd(lr))` is
      `sgd(lr, weight_decay=0.1)`. An adaptive optimizer divides that by its second moment.
    - After an optimizer, with `decoupled`, it takes a share of the parameters off the updates: `chain(adam(lr), decay(0.001,
      decoupled=True))`. The share is `weight_decay` itself, *not* times the rate, which a part cannot see: `adamw(lr,
      weight_decay=0.1)` at a constant rate is `decay(lr * 0.1, decoupled=True)`, and a rate on a schedule needs a decay on the
      same schedule, scaled.

    `weight_decay` is a number of at least 0 or a schedule (else `ArgumentError`).

    >>> import torch
    >>> part = decay(0.5, "*.weight")
    >>> params = {"out": {"weight": torch.ones(1), "bias": torch.ones(1)}}
    >>> part.update({"out": {"weight": torch.zeros(1), "bias": torch.zeros(1)}}, part.init(params), params)[0]
    {'out': {'weight': tensor([0.5000]), 'bias': tensor([0.])}}
    """
    sign = -1.0 if decoupled else 1.0

    def rule(grads: list[Tensor], params: list[Tensor], now: dict[str, Tensor]) -> list[Tensor]:
        share = sign * now["weight_decay"]
        return [(wide(grad) + share.to(width(grad)) * wide(param)).to(grad.dtype) for grad, param in zip(grads, params)]

    settings = {"weight_decay": checked("weight_decay", weight_decay)}
    whole = part("decay", settings, rule, options={"decoupled": True} if decoupled else {})
    return whole if where is None else masked(whole, where)
