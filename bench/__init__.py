"""Benchmarks: functrain and its peers side by side, interleaved in one process."""

import os

# Peers run where functrain does: on the CPU unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
