"""Reducers: how the sums that parts of a batch give become one gradient."""

from functrain.core.reduce.adasum import adasum
from functrain.core.reduce.and_mask import and_mask
from functrain.core.reduce.base import Gradient, Reducer, add
from functrain.core.reduce.clip import clip_per_example
from functrain.core.reduce.gathered import gathered
from functrain.core.reduce.geometric_median import geometric_median
from functrain.core.reduce.krum import krum, multi_krum
from functrain.core.reduce.mean import mean, sum
from functrain.core.reduce.median import median
from functrain.core.reduce.noise_scale import with_noise_scale
from functrain.core.reduce.pcgrad import pcgrad
from functrain.core.reduce.private import private
from functrain.core.reduce.sign_vote import sign_vote
from functrain.core.reduce.trimmed_mean import trimmed_mean

__all__ = [
    "Gradient",
    "Reducer",
    "adasum",
    "add",
    "and_mask",
    "clip_per_example",
    "gathered",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "pcgrad",
    "private",
    "sign_vote",
    "sum",
    "trimmed_mean",
    "with_noise_scale",
]
