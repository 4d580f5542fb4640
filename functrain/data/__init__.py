"""From position to batch: sources over arrays and HDF5, their order, and prefetching."""

from functrain.data.arrays import arrays
from functrain.data.deferred import sampled
from functrain.data.h5.concat import h5concat
from functrain.data.h5.mapped import readmmap
from functrain.data.h5.source import hdf5
from functrain.data.h5.write import h5write
from functrain.data.prefetch import prefetch
from functrain.data.source import Source

__all__ = ["Source", "arrays", "h5concat", "h5write", "hdf5", "prefetch", "readmmap", "sampled"]
