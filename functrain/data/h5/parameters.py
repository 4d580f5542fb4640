"""What the header says of HDF5's own filters, held against the dataset before HDF5 takes it unseen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from functrain.core.errors import DataError

if TYPE_CHECKING:
    import h5py

Values = tuple[int, ...]


def check_parameters(dataset: h5py.Dataset) -> None:
    """Raise `DataError` for parameters of szip, n-bit or scale-offset that cannot be this dataset's.

    HDF5 derives them from the dtype and the chunks when it writes, and trusts them when it reads: with damaged ones, HDF5 2.0
    was seen to divide by zero (SIGFPE) and to write past its memory (SIGSEGV).
    """
    import h5py

    plist = dataset.id.get_create_plist()
    elements, itemsize = math.prod(dataset.chunks), dataset.id.get_type().get_size()
    for code, sound in ((h5py.h5z.FILTER_SZIP, _szip), (h5py.h5z.FILTER_NBIT, _nbit), (h5py.h5z.FILTER_SCALEOFFSET, _scaleoffset)):
        found = plist.get_filter_by_id(code)
        if found is not None and not sound(found[1], elements, itemsize):
            name = sound.__name__.strip("_")
            raise DataError(
                f"dataset {dataset.name!r} in {dataset.file.filename!r} is damaged: its filter {name} has the parameters {found[1]}"
            )


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
