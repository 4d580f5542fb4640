"""Numbers that are packed into smaller ones by netCDF's attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import DataError

if TYPE_CHECKING:
    import h5py

# What the netCDF library fills with, where the file does not say otherwise; bytes have no such value.
_DEFAULT_FILL: dict[str, float] = {
    "i2": -32767,
    "u2": 65535,
    "i4": -2147483647,
    "u4": 4294967295,
    "i8": -9223372036854775806,
    "u8": 18446744073709551614,
    "f4": 9.969209968386869e36,
    "f8": 9.969209968386869e36,
}
_NUMBERS = ("scale_factor", "add_offset", "_FillValue", "missing_value", "valid_min", "valid_max", "valid_range")
# Attributes that say what the numbers of a dataset stand for.
PACKING = (*_NUMBERS, "_Unsigned")


def is_packed(dataset: h5py.Dataset) -> bool:
    """Whether the numbers of a dataset stand for others: they have a scale or an offset."""
    return "scale_factor" in dataset.attrs or "add_offset" in dataset.attrs


@dataclass(frozen=True)
class Packing:
    """What the attributes of a dataset say: numbers x stand for scale · x + offset, and some of them for none (NaN).

    `missing` values and those outside `least` … `most` are compared as they are stored, before scaling. The result is
    float32 for integers of at most 16 bits with attributes of float32 or none, else float64; floats keep their width.

    Source: CF conventions 1.11, sections 2.5.1 and 8.1; the NetCDF User's Guide, appendix A.
    """

    stored: np.dtype
    dtype: np.dtype
    scale: np.generic | None
    offset: np.generic | None
    missing: np.ndarray
    least: np.generic | None
    most: np.generic | None

    @classmethod
    def of(cls, dataset: h5py.Dataset, where: str) -> Packing | None:
        """The packing of a dataset; None where it has no such attributes. `DataError` for attributes that are no numbers."""
        kind = dataset.dtype.newbyteorder("=")
        if kind.kind not in "iuf":
            return None
        given = {name: _numbers(dataset.attrs[name], name, where) for name in _NUMBERS if name in dataset.attrs}
        if not given and kind.kind != "f":
            return None
        unsigned = str(np.ravel(dataset.attrs.get("_Unsigned", ""))[0]).lower() in ("true", "b'true'")
        stored = np.dtype(f"u{kind.itemsize}") if unsigned and kind.kind == "i" else kind
        valid = given.get("valid_range", np.empty(0))
        if len(valid) not in (0, 2):
            raise DataError(f"{where} has a valid_range of {len(valid)} numbers: expected two")
        least, most = valid if len(valid) else (_one(given, "valid_min"), _one(given, "valid_max"))
        scale, offset = _one(given, "scale_factor"), _one(given, "add_offset")
        return cls(
            stored,
            _unpacked_dtype(stored, [number.dtype for number in (scale, offset) if number is not None]),
            scale,
            offset,
            _missing(given, kind, stored),
            *(None if bound is None else _as_stored(np.array([bound]), kind, stored, keep=True)[0] for bound in (least, most)),
        )

    def unpacked(self, array: np.ndarray) -> np.ndarray:
        """The numbers that stored ones stand for, NaN where they stand for none."""
        stored = array.astype(array.dtype.newbyteorder("="), copy=False).view(self.stored)
        absent = np.zeros(stored.shape, np.bool_)
        for value in self.missing:
            absent |= stored == value
        if self.least is not None:
            absent |= stored < self.least
        if self.most is not None:
            absent |= stored > self.most
        numbers = stored.astype(self.dtype)
        if self.scale is not None:
            numbers *= self.scale
        if self.offset is not None:
            numbers += self.offset
        numbers[absent] = np.nan
        return numbers

    def __str__(self) -> str:
        # By str: an f-string would show a float32 with the digits of a float64.
        facts = ["· " + str(self.scale)] if self.scale is not None else []
        facts += ["+ " + str(self.offset)] if self.offset is not None else []
        facts += [f"NaN for {', '.join(map(str, self.missing))}"] if len(self.missing) else []
        facts += [f"NaN below {self.least}"] if self.least is not None else []
        facts += [f"NaN above {self.most}"] if self.most is not None else []
        return f"unpacked to {self.dtype}: {', '.join(facts)}"


def _numbers(value: Any, name: str, where: str) -> np.ndarray:
    numbers = np.atleast_1d(np.asarray(value)).ravel()
    if numbers.dtype.kind not in "iufb" or not len(numbers):
        raise DataError(f"{where} has an attribute {name} that is no number: {value!r}; unpack=False reads numbers as stored")
    return numbers.astype(numbers.dtype.newbyteorder("="))


def _one(given: dict[str, np.ndarray], name: str) -> np.generic | None:
    return given[name][0] if name in given else None


def _unpacked_dtype(stored: np.dtype, attributes: list[np.dtype]) -> np.dtype:
    joint = np.result_type(stored, *attributes)
    if joint.kind == "f":
        return joint
    return np.dtype(np.float32 if stored.itemsize <= 2 else np.float64)


def _missing(given: dict[str, np.ndarray], kind: np.dtype, stored: np.dtype) -> np.ndarray:
    """The stored numbers that stand for none; those that its dtype cannot hold are never met."""
    values = [_as_stored(given[name], kind, stored) for name in ("_FillValue", "missing_value") if name in given]
    default = _DEFAULT_FILL.get(f"{stored.kind}{stored.itemsize}")
    if "_FillValue" not in given and default is not None:
        values.append(np.array([default]).astype(stored))
    # NaN is NaN already, and equal to nothing.
    return np.unique(np.concatenate([v[~np.isnan(v)] if v.dtype.kind == "f" else v for v in values] or [np.empty(0, stored)]))


def _as_stored(values: np.ndarray, kind: np.dtype, stored: np.dtype, keep: bool = False) -> np.ndarray:
    """Attributes in the dtype of the data, in which they are compared; what it cannot hold is left out, or kept as it is."""
    with np.errstate(invalid="ignore", over="ignore"):
        cast = values.astype(kind)
    if kind.kind == "f":
        return cast
    held = cast == values
    if keep and not held.all():
        return values
    return cast[held].view(stored)
