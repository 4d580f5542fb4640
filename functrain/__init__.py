"""functrain: training as a composition of pure functions."""

from functrain import testing
from functrain.core import optim, random, reduce, tree
from functrain.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    DonatedError,
    FunctrainError,
    LossError,
    MissingExtraError,
    PositionError,
    RunError,
    TreeError,
)
from functrain.core.explain import Stage, explain
from functrain.core.functional import Apply, functional, states
from functrain.core.grad import grad
from functrain.core.loss import Losses
from functrain.core.optim.base import hyper, with_hyper
from functrain.core.reduce import Gradient, Reducer
from functrain.core.sequence import seqloss, tbptt, windows
from functrain.core.step import State, Step, step
from functrain.core.tree import named as named_params
from functrain.core.tree import tree_reduce, weights
from functrain.data import Source, arrays, h5concat, h5write, hdf5, prefetch, readmmap
from functrain.engine.compile import compiled
from functrain.engine.evaluate import evaluate
from functrain.engine.experiment import Experiment
from functrain.engine.fold import fold, repeat
from functrain.engine.parallel import accumulate, parallel
from functrain.engine.population import population
from functrain.runs import Checkpoints, Run, load_tree, save_tree, train
from functrain.search import Grid, Scored, grid, grid_search, nested

__version__ = "0.1.0"

__all__ = [
    "Apply",
    "ArgumentError",
    "Checkpoints",
    "ConfigError",
    "DataError",
    "DonatedError",
    "Experiment",
    "FunctrainError",
    "Gradient",
    "Grid",
    "LossError",
    "Losses",
    "MissingExtraError",
    "PositionError",
    "Reducer",
    "Run",
    "RunError",
    "Scored",
    "Source",
    "Stage",
    "State",
    "Step",
    "TreeError",
    "accumulate",
    "arrays",
    "compiled",
    "evaluate",
    "explain",
    "fold",
    "functional",
    "grad",
    "grid",
    "grid_search",
    "h5concat",
    "h5write",
    "hdf5",
    "hyper",
    "load_tree",
    "named_params",
    "nested",
    "optim",
    "parallel",
    "population",
    "prefetch",
    "random",
    "readmmap",
    "reduce",
    "repeat",
    "save_tree",
    "seqloss",
    "states",
    "step",
    "tbptt",
    "testing",
    "train",
    "tree",
    "tree_reduce",
    "weights",
    "windows",
    "with_hyper",
]
