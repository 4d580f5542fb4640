"""What the elements of a dataset become: tensors in native byte order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from functrain.core.errors import DataError, TreeError
from functrain.core.tree import Tree
from functrain.data.h5.layout import Layout
from functrain.data.h5.packed import Packing
from functrain.data.h5.sequences import numbers_in, righted
from functrain.data.rows import readable, tensor

Convert = Callable[[np.ndarray], Tree]
_OTHERS = "choose others with datasets=[…] (fields as 'table/field')"


class Column:
    """What becomes of the rows of a dataset, or of a field of it; `DataError` for a dtype that no tensor can hold.

    `ragged` says whether rows have lengths of their own, `sequences` whether they are more than bytes then, `key` how
    `datasets=[…]` names it.
    """

    def __init__(
        self, layout: Layout, where: str, fields: Sequence[str] = (), packing: Packing | None = None, key: str = ""
    ) -> None:
        self.layout, self.fields, self.packing = layout, tuple(fields), packing
        dtype = layout.dtype
        for field in fields:
            dtype, where = dtype.base[field], f"field {field!r} of {where}"
        self._base = base = numbers_in(dtype)
        self.ragged = base is not None
        # Bytes, of an image say, are no steps of a sequence: a function decodes them.
        self.sequences = base is not None and base.itemsize > 1
        if base is not None and layout.row_shape:
            raise DataError(f"{where} has shape {layout.shape}: sequences of variable length are read one to a sample, (N,)")
        if base is not None and fields:
            raise _refused(where, dtype)
        self._convert = _converter(dtype if base is None else base, where, _chosen(dtype, key))

    def tensors(self, rows: np.ndarray) -> Tree:
        """Rows of the dataset as tensors `(K, …)`; those of a ragged column must have one length, or are a `TreeError`."""
        if self.ragged:
            lengths = {len(row) for row in rows}
            if len(lengths) > 1:
                raise TreeError(
                    f"dataset {self.layout.name!r} has sequences of {min(lengths)} … {max(lengths)} numbers, which cannot be "
                    f"stacked: .padded({max(lengths)}) makes them alike, with a mask, before .batch"
                )
            return self._convert(np.stack([self._numbers(row) for row in rows]))
        for field in self.fields:
            rows = rows[field]
        if self.packing is not None:
            rows = self.packing.unpacked(rows)
        return self._convert(_apart(rows) if self.fields else rows)

    def each(self, rows: np.ndarray) -> list[Tree]:
        """Rows of a ragged column, one by one: `(T_i,)`."""
        return [self._convert(self._numbers(row)) for row in rows]

    def _numbers(self, row: np.ndarray) -> np.ndarray:
        return (row if self._base is None else righted(row, self._base)).copy()

    def blank(self) -> Tree:
        """What no rows of it become: structure, dtypes and shapes."""
        if self._base is not None:
            return self._convert(np.empty((0, 0), self._base))
        return self.tensors(np.empty((0, *self.layout.row_shape), self.layout.dtype))

    def __str__(self) -> str:
        field = f", field {'/'.join(self.fields)}" if self.fields else ""
        return field + ("" if self.packing is None else f", {self.packing}")


def _converter(dtype: np.dtype, where: str, advice: str = _OTHERS) -> Convert:
    if dtype.names:
        each = {name: _converter(dtype[name], f"field {name!r} of {where}", advice) for name in dtype.names}
        return lambda rows: {name: convert(_apart(rows[name])) for name, convert in each.items()}
    if dtype.subdtype is not None:
        # The rows of such a field have its dimensions already.
        return _converter(dtype.subdtype[0], where, advice)
    if readable(dtype):
        return tensor
    if dtype.kind == "V" and dtype.itemsize:
        return _bytes
    raise _refused(where, dtype, advice)


def _chosen(dtype: np.dtype, key: str) -> str:
    """What to do about a compound that cannot be read whole: name the fields that can."""
    held = [f"{key}/{name}".lstrip("/") for name in dtype.names or () if _holdable(dtype[name])]
    return f"choose its other fields with datasets={held}" if held else _OTHERS


def _holdable(dtype: np.dtype) -> bool:
    try:
        _converter(dtype, "")
    except DataError:
        return False
    return True


def _apart(field: np.ndarray) -> np.ndarray:
    """The numbers of a field side by side: torch refuses the steps of a record, even where there is but one row."""
    return field if field.dtype.names else field.copy()


def _bytes(rows: np.ndarray) -> Tensor:
    """Opaque elements of n bytes as `(…, n)`."""
    return tensor(np.ascontiguousarray(rows).reshape(*rows.shape, 1).view(np.uint8))


def _refused(where: str, dtype: np.dtype, advice: str = _OTHERS) -> DataError:
    return DataError(
        f"{where} has dtype {kind(dtype)}, which no tensor can hold: {advice}, or write its numbers as bool, int, float or "
        "complex"
    )


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
