"""The filters of a chunked dataset, undone outside HDF5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from functrain.data.h5.checksum import fletcher32
from functrain.data.h5.codecs import Codec, DecodeError, ShortError, Unsupported, Values, check_size, decoders, installed
from functrain.data.h5.registry import described, names
from functrain.data.h5.scratch import scratch

if TYPE_CHECKING:
    import h5py

__all__ = ["FLETCHER32", "DecodeError", "Filter", "Pipeline", "ShortError", "names"]

# The number of the checksum in HDF5's registry.
FLETCHER32 = 3


@dataclass(frozen=True)
class Filter:
    """One filter: its number in HDF5's registry, its name, and its parameters (`cd_values`)."""

    code: int
    name: str
    cd_values: Values

    @classmethod
    def of(cls, described: tuple[int, int, Values, bytes]) -> Filter:
        """The filter that h5py's `get_filter` tells of."""
        code, _flags, values, name = described
        return cls(code, names.get(code, name.decode("utf-8", "replace")), tuple(values))

    def __str__(self) -> str:
        return self.name if self.code in names else f"filter {self.code}"


class Pipeline:
    """The filters of a chunked dataset in the order of writing; `decode` undoes them, from any thread.

    - `hindrance`: why they cannot be undone here, in words; None where they can.

    >>> import numpy as np, zlib
    >>> pipeline = Pipeline([Filter(1, "gzip", (4,)), Filter(3, "fletcher32", ())])
    >>> str(pipeline), pipeline.hindrance
    ('gzip+fletcher32', None)
    >>> out = np.empty(5, np.uint8)
    >>> pipeline.decode(zlib.compress(b"bytes"), 0b10, out)
    >>> out.tobytes()
    b'bytes'
    """

    def __init__(self, filters: Sequence[Filter], packages: frozenset[str] | None = None) -> None:
        self.filters = tuple(filters)
        self.hindrance: str | None = None
        self._packages = installed() if packages is None else packages
        # What is to be done, in the order of writing: the bit of the mask, and the codec (None: a checksum).
        self._steps: list[tuple[int, Codec | None]] = []
        try:
            self._steps = self._plan()
        except Unsupported as reason:
            self.hindrance = str(reason)

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> Pipeline:
        """The pipeline of a chunked dataset."""
        plist = dataset.id.get_create_plist()
        return cls([Filter.of(plist.get_filter(place)) for place in range(plist.get_nfilters())])

    def __reduce__(self) -> tuple[type[Pipeline], tuple[tuple[Filter, ...], frozenset[str]]]:
        return Pipeline, (self.filters, self._packages)

    @property
    def plain(self) -> bool:
        """Whether there are no filters."""
        return not self.filters

    def skipped(self, mask: int) -> bool:
        """Whether a chunk of this mask is stored as it is: its writer left out every filter, as where none made it smaller."""
        return not any(not mask & bit for bit, _ in self._steps)

    @property
    def reorders(self) -> bool:
        """Whether all it does is to put the bytes of a chunk in another order."""
        return bool(self._steps) and all(codec is not None and not codec.compresses for _, codec in self._steps)

    def __str__(self) -> str:
        return "+".join(map(str, self.filters)) or "no filter"

    def _plan(self) -> list[tuple[int, Codec | None]]:
        makers = decoders(self._packages)
        steps: list[tuple[int, Codec | None]] = []
        for place, filter in enumerate(self.filters):
            if filter.code == FLETCHER32:
                steps.append((1 << place, None))
            elif filter.code not in makers:
                raise Unsupported(f"{described(filter.code, filter.name)} is left to h5py")
            elif (codec := makers[filter.code](filter.cd_values)) is not None:
                steps.append((1 << place, codec))
        # The size of the chunk, which bounds all memory, tells what one compression gives, but not what another takes.
        if sum(codec is not None and codec.compresses for _, codec in steps) > 1:
            raise Unsupported(f"compressed twice ({self}), which is left to h5py")
        return steps

    def decode(self, raw: bytes | memoryview, mask: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 `(B,)`, contiguous and writable, with the chunk that is stored as `raw`.

        Bit `i` of `mask` says that filter `i` was skipped for this chunk. Raises `DecodeError` for bytes that do not
        give exactly `B` bytes, or fail a checksum: what `out` holds then has no meaning.
        """
        assert self.hindrance is None, self.hindrance
        # Some codecs would write to read-only memory.
        assert out.flags.carray, "out is not contiguous, or read-only"
        data = memoryview(raw)
        codecs = [codec for bit, codec in self._steps if not mask & bit]
        slot = 0
        while codecs:
            codec = codecs.pop()
            if codec is None:
                data = verified(data)
                continue
            # A checksum that was added before the compression is part of what that gives.
            size = len(out) + 4 * codecs.count(None) if codec.compresses else len(data)
            target = scratch.take(slot, size) if codecs else out
            codec.decode(data, target)
            data, slot = target.data, 1 - slot
        if data.obj is not out:
            check_size("the chunk has", len(data), out)
            out[:] = np.frombuffer(data, np.uint8)


def verified(data: memoryview) -> memoryview:
    """The bytes before the checksum that ends them; `DecodeError` where it is not theirs."""
    if len(data) < 4:
        raise DecodeError(f"no checksum: {len(data)} bytes")
    stored, found = int.from_bytes(data[-4:], "little"), fletcher32(data[:-4])
    # HDF5 up to 1.6.2 exchanged the bytes of each half on little-endian machines.
    if stored not in (found, (found & 0xFF00FF) << 8 | found >> 8 & 0xFF00FF):
        raise DecodeError(f"checksum is {stored:#010x}, its data say {found:#010x}")
    return data[:-4]
