"""What the header says of HDF5's own filters, held against the dataset before HDF5 takes it unseen."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from functrain.core.errors import DataError
from functrain.data.h5.registry import described

if TYPE_CHECKING:
    import h5py

    from functrain.data.h5.filters import Pipeline
    from functrain.data.h5.index import ChunkIndex

Values = tuple[int, ...]


def check_parameters(dataset: h5py.Dataset) -> None:
    """Raise `DataError` for parameters of szip, n-bit or scale-offset that cannot be this dataset's.

    HDF5 derives them from the dtype and the chunks when it writes, and trusts them when it reads: with damaged ones, HDF5 2.0
    was seen to divide by zero (SIGFPE) and to write past its memory (SIGSEGV).
    """
    import h5py

    plist = dataset.id.get_create_plist()
    elements, itemsize = math.prod(dataset.chunks), dataset.id.get_type().get_size()
    checks = {
        "szip": (h5py.h5z.FILTER_SZIP, _szip),
        "nbit": (h5py.h5z.FILTER_NBIT, _nbit),
        "scaleoffset": (h5py.h5z.FILTER_SCALEOFFSET, _scaleoffset),
    }
    for name, (code, sound) in checks.items():
        found = plist.get_filter_by_id(code)
        if found is not None and not sound(found[1], elements, itemsize):
            where = f"dataset {dataset.name!r} in {dataset.file.filename!r}"
            raise DataError(f"{where} is damaged: its filter {name} has the parameters {found[1]}")


def check_size(dataset: h5py.Dataset, end: int = 0) -> None:
    """Raise `DataError` if the dataset's file has become shorter since it was opened, or ends before byte `end`.

    Behind the end of a file, HDF5 2.0 reads zeros.
    """
    file = dataset.file
    if file.driver != "sec2":
        return
    size, needed = os.fstat(file.id.get_vfd_handle()).st_size, max(end, file.id.get_filesize())
    if size < needed:
        where = f"dataset {dataset.name!r} in {file.filename!r}"
        raise DataError(f"{where} cannot be read: the file was cut short to {size} bytes, and {needed} are needed")


def check_chunk(dataset: h5py.Dataset, index: ChunkIndex, pipeline: Pipeline, number: int) -> None:
    """Raise `DataError` for a chunk that lies behind the end of the file, or by szip claims to be larger than a chunk is.

    With one byte of a chunk of 288 bytes damaged, HDF5 2.0 was seen to take 4 GiB for it.
    """
    import h5py

    check_size(dataset, int(index.offset[number]) + int(index.size[number]))
    mask = int(index.mask[number])
    filters = [filter.code for place, filter in enumerate(pipeline.filters) if not mask >> place & 1]
    added = filters.count(h5py.h5z.FILTER_FLETCHER32)
    last = [code for code in filters if code != h5py.h5z.FILTER_FLETCHER32][-1:]
    # One of its full size may lie at the edge, unfiltered.
    if index.offset[number] < 0 or last != [h5py.h5z.FILTER_SZIP] or index.size[number] == index.bytes:
        return
    _mask, raw = dataset.id.read_direct_chunk(tuple(part.start for part in index.region(number)))
    claimed = int.from_bytes(raw[:4], "little")
    # A checksum that was added before is part of it.
    if claimed > index.bytes + 4 * added:
        where = f"dataset {dataset.name!r} in {dataset.file.filename!r}"
        raise DataError(f"{where} is damaged: chunk {index.coordinates(number)} claims {claimed} bytes, not {index.bytes}")


def lacking(pipeline: Pipeline) -> str:
    """The filters that h5py has not, in words; empty where it has all."""
    import h5py

    return ", ".join(described(each.code, each.name) for each in pipeline.filters if not h5py.h5z.filter_avail(each.code))


def _szip(values: Values, elements: int, itemsize: int) -> bool:
    # Options, the pixels of a block, the bits of a pixel, the pixels of a line.
    if len(values) != 4:
        return False
    _options, block, bits, line = values
    return 2 <= block <= 32 and block % 2 == 0 and 1 <= bits <= 8 * itemsize and block <= line <= 128 * block


def _nbit(values: Values, elements: int, itemsize: int) -> bool:
    # Their number, whether there is nothing to do, the elements of a chunk, then the type: 1 is a number, with its size,
    # byte order, precision and offset.
    if len(values) < 5 or values[0] != len(values) or values[2] != elements:
        return False
    if values[3] != 1:
        return True
    return len(values) == 8 and values[4] == itemsize and 1 <= values[6] <= 8 * itemsize - values[7]


def _scaleoffset(values: Values, elements: int, itemsize: int) -> bool:
    # The kind of scale and its factor, the elements of a chunk, then the type: 0 is an int, 1 a float, and its size.
    return len(values) >= 8 and values[0] <= 2 and values[2] == elements and values[3] <= 1 and values[4] == itemsize
