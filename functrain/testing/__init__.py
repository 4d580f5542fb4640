"""The laws as checkers: run them on a reducer, optimizer, gradient, step or source of your own.

Each checker returns None, or raises `LawError`, which names the law and the first counter-example to it. "Equal" is
up to the rounding of the dtype, "the same bits" is `torch.equal`.
"""

from functrain.data.laws import check_prefetch, check_source
from functrain.testing.comparing import LawError, equal, same_bits
from functrain.testing.gradients import check_grad
from functrain.testing.guards import check_guard
from functrain.testing.optimizers import check_optimizer
from functrain.testing.predictions import check_batch_mates
from functrain.testing.reducers import check_reducer
from functrain.testing.steps import check_step

__all__ = [
    "LawError",
    "check_batch_mates",
    "check_grad",
    "check_guard",
    "check_optimizer",
    "check_prefetch",
    "check_reducer",
    "check_source",
    "check_step",
    "equal",
    "same_bits",
]
