"""How new datasets are to be stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import ArgumentError
from functrain.data.source import integer

if TYPE_CHECKING:
    import h5py

# What h5py would choose splits rows (a 96×96×3 image over 192 chunks): chunks of whole rows, of about this size.
CHUNK_BYTES = 1 << 20
LAYOUTS = ("contiguous", "chunked")


@dataclass(frozen=True)
class Storage:
    """The arguments of `h5write` and `h5concat` that say how datasets are stored, checked."""

    layout: str | None = None
    chunks: int | tuple[int, ...] | None = None
    compression: Any = None
    shuffle: bool = False
    checksum: bool = False

    @classmethod
    def of(cls, layout: str | None, chunks: Any, compression: Any, shuffle: bool, checksum: bool) -> Storage:
        """The arguments as they were given; `ArgumentError` for those that mean nothing together."""
        if layout is not None and layout not in LAYOUTS:
            raise ArgumentError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
        if isinstance(chunks, tuple):
            chunks = tuple(integer("chunks", size, 1) for size in chunks)
        elif chunks is not None:
            chunks = integer("chunks", chunks, 1)
        for name, given in (("shuffle", shuffle), ("checksum", checksum)):
            if not isinstance(given, bool):
                raise ArgumentError(f"{name} takes True or False, got {given!r}")
        storage = cls(layout, chunks, compression, shuffle, checksum)
        if layout == "contiguous" and storage.by_options:
            raise ArgumentError("contiguous datasets have no chunks, filters or checksums: leave them out, or layout='chunked'")
        return storage

    @property
    def by_options(self) -> bool:
        """Whether an option is given that only chunked datasets have."""
        return self.chunks is not None or self.compression is not None or self.shuffle or self.checksum

    @property
    def given(self) -> bool:
        """Whether anything is asked for."""
        return self.layout is not None or self.by_options

    @property
    def chunked(self) -> bool:
        """Whether datasets are chunked."""
        return self.layout == "chunked" or self.by_options

    def chunks_of(self, shape: tuple[int, ...], itemsize: int, grows: bool = False) -> tuple[int, ...] | None:
        """The shape of chunks: whole rows, about 1 MiB of them; None for a dataset that is stored contiguous.

        >>> Storage(layout="chunked").chunks_of((100, 256, 1024), 1)
        (4, 256, 1024)
        """
        empty = 0 in (shape[1:] if grows else shape)
        if not (self.chunked or grows) or not shape or (empty and not grows):
            return None
        if isinstance(self.chunks, tuple):
            return self.chunks
        row = max(1, math.prod(shape[1:])) * max(1, itemsize)
        rows = max(1, CHUNK_BYTES // row) if self.chunks is None else self.chunks
        # HDF5 has no chunk without elements, also where there are no elements to store.
        return (rows if grows else min(rows, shape[0]), *(max(1, size) for size in shape[1:]))

    def create(
        self, group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any, grows: bool = False, fill: Any = None
    ) -> h5py.Dataset:
        """A new dataset; one that `grows` has no end along its first axis. `ArgumentError` for what HDF5 refuses."""
        itemsize = dtype.itemsize if isinstance(dtype, np.dtype) else dtype.get_size()
        chunks = self.chunks_of(shape, itemsize, grows)
        options: dict[str, Any] = {}
        if chunks is not None:
            options = {"chunks": chunks, "shuffle": self.shuffle or None, "fletcher32": self.checksum or None}
            options |= self._compression()
        if grows:
            options["maxshape"] = (None, *shape[1:])
        try:
            return group.create_dataset(name, shape, dtype, fillvalue=fill, **options)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            unknown = "ompression filter" in str(error)
            help = ". h5py has 'gzip' and 'lzf'; hdf5plugin has more: compression=hdf5plugin.Zstd(), .LZ4(), .Blosc() …"
            raise ArgumentError(
                f"chunks {chunks} or compression {self.compression!r} do not suit {name!r} {shape}: {error}"
                f"{help if unknown else ''}"
            ) from error

    def _compression(self) -> dict[str, Any]:
        # What hdf5plugin makes is a mapping of h5py's arguments.
        if isinstance(self.compression, Mapping):
            unknown = set(self.compression) - {"compression", "compression_opts"}
            if unknown:
                raise ArgumentError(f"compression takes {{'compression': …, 'compression_opts': …}}, got {self.compression!r}")
            return dict(self.compression)
        return {} if self.compression is None else {"compression": self.compression}


__all__ = ["Storage"]
