"""What is awkward about how a dataset lies in its file, for whoever trains from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from functrain.core.errors import DataError
from functrain.core.explain import readable
from functrain.data.h5.filters import Pipeline
from functrain.data.h5.registry import described
from functrain.data.h5.virtual import check_virtual

if TYPE_CHECKING:
    import h5py


# Less is in memory at once, whatever its layout.
SMALL = 1 << 19
_LARGE, _TINY = 1 << 24, 1 << 12


def concerns(dataset: h5py.Dataset) -> Iterator[str]:
    """What slows reading down, or makes it impossible, in words, with what helps: filters, chunks, missing sources."""
    import h5py

    try:
        check_virtual(dataset)
    except DataError as error:
        yield str(error)
    if dataset.chunks is None or not dataset.shape:
        return
    pipeline = Pipeline.of(dataset)
    for filter in pipeline.filters if pipeline.hindrance is not None else ():
        if not h5py.h5z.filter_avail(filter.code):
            yield f"cannot be read here without the filter {described(filter.code, filter.name)}"
    if dataset.size * dataset.dtype.itemsize < SMALL:
        return
    touched = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape[1:], dataset.chunks[1:]))
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if touched > 1:
        yield f"one sample touches {touched:,} chunks: h5advice measures what chunks of whole samples would give"
    elif chunk > _LARGE and dataset.chunks[0] > 1:
        yield f"chunks of {readable(chunk)} hold {dataset.chunks[0]:,} samples: .shuffle(seed, within=…) decodes each once"
    elif chunk < _TINY:
        yield f"chunks of {readable(chunk)} are small: h5advice measures what larger ones would give"
