"""Where training meets the disk: run directories, checkpoints, configs and what is shown of them."""

from functrain.runs.best import Best as Best
from functrain.runs.checkpoints import Checkpoints as Checkpoints
from functrain.runs.checkpoints import Loaded as Loaded
from functrain.runs.config import config_from_dict as config_from_dict
from functrain.runs.config import config_from_flags as config_from_flags
from functrain.runs.config import config_to_dict as config_to_dict
from functrain.runs.curves import plot_curves as plot_curves
from functrain.runs.directory import Run as Run
from functrain.runs.history import History as History
from functrain.runs.store import hash_tree as hash_tree
from functrain.runs.store import load_metadata as load_metadata
from functrain.runs.store import load_named as load_named
from functrain.runs.store import load_tree as load_tree
from functrain.runs.store import save_tree as save_tree
from functrain.runs.table import Table as Table
from functrain.runs.train import train as train
