"""Schedules: a hyperparameter as a function of the count of updates."""

from functrain.core.optim.schedules.cycles import one_cycle, restarts
from functrain.core.optim.schedules.decay import constant, cosine, exponential, inverse_root, linear, piecewise
from functrain.core.optim.schedules.joined import join, warmup

__all__ = [
    "constant",
    "cosine",
    "exponential",
    "inverse_root",
    "join",
    "linear",
    "one_cycle",
    "piecewise",
    "restarts",
    "warmup",
]
