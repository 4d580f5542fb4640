"""The optimizers of TorchOpt, as they are."""

from __future__ import annotations

from typing import Any

from functrain.core.errors import ArgumentError, MissingExtraError
from functrain.core.optim.base import Optimizer
from functrain.core.tree import Tree


def from_torchopt(transformation: Any) -> Optimizer:
    """An optimizer of TorchOpt's functional kind: `from_torchopt(torchopt.adam(1e-3))`, or a chain of them.

    Its updates are pure tensor arithmetic, which a gradient flows through; all but `clip_grad_norm`, which looks at values: put
    `ft.optim.clip_by_norm` before the optimizer with `ft.optim.chain`. Its hyperparameters are constants, and not in the state.
    An optimizer of optax's kind, `update(grads, state, params)`, needs no adapter: `ft.step` takes it as it is.

    Raises `ArgumentError` for anything else (of TorchOpt's classes, which hold their params, take the function), and
    `MissingExtraError` without TorchOpt.

    >>> import torch, torchopt
    >>> optimizer = from_torchopt(torchopt.sgd(0.5))
    >>> params = {"w": torch.ones(2)}
    >>> optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.5000, -0.5000])}
    """
    try:
        from torchopt.base import GradientTransformation
    except ImportError as error:
        raise MissingExtraError.of("torchopt", "torchopt", "from_torchopt") from error
    if not isinstance(transformation, GradientTransformation):
        got = transformation if isinstance(transformation, type) else type(transformation)
        raise ArgumentError(f"from_torchopt takes what torchopt.adam(1e-3) and its like give, got {got.__name__}")

    def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        updates, state = transformation.update(grads, state, params=params, inplace=False)
        return updates, state

    return Optimizer(transformation.init, update, name="torchopt")
