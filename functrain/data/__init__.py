"""From position to batch: sources over arrays and HDF5, their order, and prefetching."""

from functrain.data.arrays import arrays
from functrain.data.concat import h5concat
from functrain.data.deferred import sampled
from functrain.data.hdf5 import hdf5, readmmap
from functrain.data.prefetch import prefetch
from functrain.data.source import Source
from functrain.data.write import h5write

__all__ = ["Source", "arrays", "h5concat", "h5write", "hdf5", "prefetch", "readmmap", "sampled"]
