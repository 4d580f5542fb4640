"""functrain: training as a composition of pure functions."""

from functrain import testing
from functrain.core import optim, privacy, random, reduce, tree
from functrain.core.adversarial import adversarial
from functrain.core.average import average, averaged
from functrain.core.deferred import Deferred
from functrain.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    DonatedError,
    FunctrainError,
    LossError,
    MissingExtraError,
    NonFiniteError,
    PositionError,
    RunError,
    TreeError,
)
from functrain.core.examples import example_grads
from functrain.core.explain import Stage, explain
from functrain.core.functional import Apply, functional, states
from functrain.core.grad import grad
from functrain.core.guard import guard
from functrain.core.health import Health, health, monitor
from functrain.core.loss import Losses
from functrain.core.loss_scale import loss_scaled
from functrain.core.optim.hyper import hyper, with_hyper
from functrain.core.precision import Precision, mixed
from functrain.core.reduce import Gradient, Reducer
from functrain.core.remat import remat
from functrain.core.sequence import seqloss, tbptt, windows
from functrain.core.step import State, Step, step
from functrain.core.tree import named as named_params
from functrain.core.tree import tree_reduce, weights
from functrain.data import (
    Budget,
    Source,
    arrays,
    concat,
    content_hash,
    csr,
    episodes,
    h5advice,
    h5concat,
    h5inspect,
    h5write,
    hdf5,
    mix,
    prefetch,
    ragged,
    readmmap,
    sampled,
    source,
)
from functrain.engine.compile import compiled
from functrain.engine.evaluate import evaluate
from functrain.engine.experiment import Experiment
from functrain.engine.fold import fold, repeat
from functrain.engine.lr_find import lr_find
from functrain.engine.parallel import accumulate, parallel
from functrain.engine.population import population
from functrain.engine.tune import tune
from functrain.engine.unroll import unroll
from functrain.runs import Best, Checkpoints, History, Run, load_tree, save_tree, train
from functrain.search import Grid, Scored, grid, grid_search, nested

__version__ = "0.1.0"

__all__ = [
    "Apply",
    "ArgumentError",
    "Best",
    "Budget",
    "Checkpoints",
    "ConfigError",
    "DataError",
    "Deferred",
    "DonatedError",
    "Experiment",
    "FunctrainError",
    "Gradient",
    "Grid",
    "Health",
    "History",
    "LossError",
    "Losses",
    "MissingExtraError",
    "NonFiniteError",
    "PositionError",
    "Precision",
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
    "adversarial",
    "arrays",
    "average",
    "averaged",
    "compiled",
    "concat",
    "content_hash",
    "csr",
    "episodes",
    "evaluate",
    "example_grads",
    "explain",
    "fold",
    "functional",
    "grad",
    "grid",
    "grid_search",
    "guard",
    "h5advice",
    "h5concat",
    "h5inspect",
    "h5write",
    "hdf5",
    "health",
    "hyper",
    "load_tree",
    "loss_scaled",
    "lr_find",
    "mix",
    "mixed",
    "monitor",
    "named_params",
    "nested",
    "optim",
    "parallel",
    "population",
    "prefetch",
    "privacy",
    "ragged",
    "random",
    "readmmap",
    "reduce",
    "remat",
    "repeat",
    "sampled",
    "save_tree",
    "seqloss",
    "source",
    "states",
    "step",
    "tbptt",
    "testing",
    "train",
    "tree",
    "tree_reduce",
    "tune",
    "unroll",
    "weights",
    "windows",
    "with_hyper",
]
