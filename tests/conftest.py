"""What every test leaves as it found it: torch's threads, and no thread of functrain's own."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "functrain",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=14,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("functrain")

# On two shared cores a second thread inside small operations waits more than it works: an LSTM of 5 units took 400 ms
# a gradient with two, 25 ms with one. Tests that are about threads set their number themselves.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # Torch's own, when inductor and forward-mode derivatives are first imported.
    config.addinivalue_line("filterwarnings", r"ignore:`torch\.jit\.script.*` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("functrain") and not thread.daemon]
    assert not left, f"threads left behind: {left}"


@pytest.fixture
def without_plugins() -> Iterator[None]:
    """HDF5 without the filters of hdf5plugin, which another test of this process may have brought."""
    plugins = sys.modules.get("hdf5plugin")
    if plugins is None:
        yield
        return
    import h5py

    for code in plugins.FILTERS.values():
        if h5py.h5z.filter_avail(code):
            h5py.h5z.unregister_filter(code)
    yield
    plugins.register(force=True)
