"""Optimizers as pairs of pure functions, `(init, update)`, one file each, and the schedules of their rates."""

from functrain.core.optim.adam import adam, adamw
from functrain.core.optim.base import Optimizer, Schedule, apply_updates, hyper, with_hyper
from functrain.core.optim.schedules import constant, cosine, piecewise, warmup
from functrain.core.optim.sgd import sgd

__all__ = [
    "Optimizer",
    "Schedule",
    "adam",
    "adamw",
    "apply_updates",
    "constant",
    "cosine",
    "hyper",
    "piecewise",
    "sgd",
    "warmup",
    "with_hyper",
]
