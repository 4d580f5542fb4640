"""Benchmarks: functrain and its peers side by side, interleaved in one process."""
