"""From position to batch: sources over arrays and HDF5, their order, and prefetching."""

from functrain.data.arrays import arrays
from functrain.data.budget import Budget
from functrain.data.concat import concat
from functrain.data.deferred import sampled
from functrain.data.episodes import episodes
from functrain.data.foreign import source
from functrain.data.h5.advice import h5advice
from functrain.data.h5.concat import h5concat
from functrain.data.h5.csr import csr
from functrain.data.h5.hashes import content_hash
from functrain.data.h5.inspect import h5inspect
from functrain.data.h5.mapped import readmmap
from functrain.data.h5.source import hdf5
from functrain.data.h5.write import h5write
from functrain.data.mix import mix
from functrain.data.prefetch import prefetch
from functrain.data.ragged import ragged
from functrain.data.source import Source

__all__ = [
    "Budget",
    "Source",
    "arrays",
    "concat",
    "content_hash",
    "csr",
    "episodes",
    "h5advice",
    "h5concat",
    "h5inspect",
    "h5write",
    "hdf5",
    "mix",
    "prefetch",
    "ragged",
    "readmmap",
    "sampled",
    "source",
]
