"""Optimizers as pairs of pure functions, `(init, update)`, one file each, and the schedules of their rates."""

from functrain.core.optim.adadelta import adadelta
from functrain.core.optim.adafactor import adafactor
from functrain.core.optim.adagrad import adagrad
from functrain.core.optim.adam import adam, adamw
from functrain.core.optim.adamax import adamax
from functrain.core.optim.amsgrad import amsgrad
from functrain.core.optim.base import Optimizer, Schedule, apply_updates
from functrain.core.optim.centralise import centralise
from functrain.core.optim.chain import chain
from functrain.core.optim.clip import clip, clip_adaptive, clip_by_norm
from functrain.core.optim.decay import decay
from functrain.core.optim.from_torch import from_torch
from functrain.core.optim.from_torchopt import from_torchopt
from functrain.core.optim.hyper import hyper, with_hyper
from functrain.core.optim.lamb import lamb
from functrain.core.optim.lion import lion
from functrain.core.optim.lookahead import lookahead
from functrain.core.optim.muon import muon
from functrain.core.optim.nadam import nadam
from functrain.core.optim.noise import noise
from functrain.core.optim.partition import freeze, masked, partition
from functrain.core.optim.plateau import plateau
from functrain.core.optim.radam import radam
from functrain.core.optim.rmsprop import rmsprop
from functrain.core.optim.schedule_free import schedule_free, schedule_free_params
from functrain.core.optim.schedules import (
    constant,
    cosine,
    exponential,
    inverse_root,
    join,
    linear,
    one_cycle,
    piecewise,
    restarts,
    warmup,
)
from functrain.core.optim.sgd import sgd
from functrain.core.optim.skip_nonfinite import skip_nonfinite

__all__ = [
    "Optimizer",
    "Schedule",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "apply_updates",
    "centralise",
    "chain",
    "clip",
    "clip_adaptive",
    "clip_by_norm",
    "constant",
    "cosine",
    "decay",
    "exponential",
    "freeze",
    "from_torch",
    "from_torchopt",
    "hyper",
    "inverse_root",
    "join",
    "lamb",
    "linear",
    "lion",
    "lookahead",
    "masked",
    "muon",
    "nadam",
    "noise",
    "one_cycle",
    "partition",
    "piecewise",
    "plateau",
    "radam",
    "restarts",
    "rmsprop",
    "schedule_free",
    "schedule_free_params",
    "sgd",
    "skip_nonfinite",
    "warmup",
    "with_hyper",
]
