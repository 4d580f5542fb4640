"""Sizes that a dataset's header claims, held against what the file holds and the machine has."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from functrain.core.errors import DataError
from functrain.core.explain import readable

if TYPE_CHECKING:
    import h5py

# The format's own limit, which a damaged header passes.
_CHUNK = 1 << 32
# Sparse datasets of terabytes exist, so only what no disk holds is taken for damage.
_UNWRITTEN = 1 << 50


def plausible(dataset: h5py.Dataset, axis: int = 0, memory: int | None = None) -> None:
    """Raise `DataError` for a dataset whose claimed sizes cannot be meant; nothing of such a size is allocated.

    That is a chunk of more than 4 GiB, a chunk or a sample (along `axis`) larger than `memory` (default: this machine's),
    and a shape of over 1 PiB of which less than a thousandth was ever written.
    """
    if not dataset.shape:
        return
    memory = memory or _memory()
    itemsize = dataset.id.get_type().get_size()
    where = f"dataset {dataset.name!r} in {dataset.file.filename!r}"
    if dataset.chunks is not None:
        chunk = math.prod(dataset.chunks) * itemsize
        if chunk > min(_CHUNK, memory):
            raise _implausible(f"{where} has chunks {dataset.chunks} of {readable(chunk)}", f"{readable(memory)} of memory")
    sample = math.prod(size for place, size in enumerate(dataset.shape) if place != axis % len(dataset.shape)) * itemsize
    if sample > memory and 0 not in dataset.shape:
        raise _implausible(f"{where} has samples of {readable(sample)}, shape {dataset.shape}", f"{readable(memory)} of memory")
    _check_written(dataset, itemsize, where)


def _check_written(dataset: h5py.Dataset, itemsize: int, where: str) -> None:
    import h5py

    plist = dataset.id.get_create_plist()
    if plist.get_layout() not in (h5py.h5d.CHUNKED, h5py.h5d.CONTIGUOUS) or plist.get_external_count():
        return
    logical = math.prod(dataset.shape) * itemsize
    if logical <= _UNWRITTEN:
        return
    # Not for every dataset: to count chunks takes 0.5 µs each.
    chunk = math.prod(dataset.chunks or ()) * itemsize
    written = dataset.id.get_storage_size() if dataset.chunks is None else dataset.id.get_num_chunks() * chunk
    if written < logical // 1000:
        held = f"{readable(written)} of it that were ever written"
        raise _implausible(f"{where} has shape {dataset.shape}, {readable(logical)}", held)


def _implausible(claim: str, have: str) -> DataError:
    return DataError(f"{claim}, against {have}: its header is damaged, or it is no data to train from")


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
