"""HDF5 files: three ways to their bytes, sources over them, and writing them."""
