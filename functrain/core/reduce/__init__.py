"""Reducers: how the sums that parts of a batch give become one gradient."""

from functrain.core.reduce.base import Gradient, Reducer, add
from functrain.core.reduce.gathered import gathered
from functrain.core.reduce.mean import mean, sum

__all__ = ["Gradient", "Reducer", "add", "gathered", "mean", "sum"]
