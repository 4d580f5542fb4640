"""functrain: training as a composition of pure functions."""

from functrain.core import optim, random, reduce, tree
from functrain.core.errors import FunctrainError
from functrain.core.explain import Stage, explain
from functrain.core.functional import functional, states
from functrain.core.grad import grad
from functrain.core.loss import Losses
from functrain.core.optim import with_hyper
from functrain.core.reduce import Gradient, Reducer
from functrain.core.step import State, Step, step
from functrain.core.tree import tree_reduce, weights
