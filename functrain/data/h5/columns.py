"""What the elements of a dataset become: tensors in native byte order."""

from __future__ import annotations

import numpy as np

from functrain.core.errors import DataError
from functrain.core.tree import Tree
from functrain.data.h5.readers import Reader
from functrain.data.rows import readable, tensor


class Column:
    """One dataset of a source; raises `DataError` for a dtype that no tensor can hold."""

    def __init__(self, reader: Reader, where: str) -> None:
        self.reader = reader
        if not readable(reader.layout.dtype):
            raise DataError(
                f"{where} has dtype {kind(reader.layout.dtype)}, which no tensor can hold: choose others with datasets=[…], "
                "or write its numbers as bool, int, float or complex"
            )

    def rows(self, where: slice | np.ndarray) -> Tree:
        """The rows as tensors `(K, …)`."""
        return tensor(self.reader.rows(where))

    def __str__(self) -> str:
        return str(self.reader.layout)


def kind(dtype: np.dtype) -> str:
    """A dtype in words."""
    import h5py

    if h5py.check_string_dtype(dtype) is not None:
        return "string"
    if h5py.check_vlen_dtype(dtype) is not None:
        return f"variable-length {h5py.check_vlen_dtype(dtype)}"
    if h5py.check_ref_dtype(dtype) is not None:
        return "reference"
    if dtype.names:
        return f"compound ({', '.join(dtype.names)})"
    return "opaque" if dtype.kind == "V" and not dtype.subdtype else str(dtype)
