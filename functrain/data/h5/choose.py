"""Which datasets of a file a source reads, and what its elements are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import ArgumentError, DataError
from functrain.core.tree import Tree
from functrain.data.arguments import integer
from functrain.data.h5.columns import Column
from functrain.data.h5.files import dataset_of, found, intact, listing
from functrain.data.h5.layout import Layout, layout_of
from functrain.data.h5.packed import Packing, is_packed
from functrain.data.stacking import disagreement

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class Wanted:
    """The arguments of `hdf5` that say what is read of each file and group, checked."""

    datasets: tuple[str, ...] | None
    axis: int | dict[str, int]
    unpack: bool
    length: int | None

    @classmethod
    def of(cls, datasets: Any, axis: Any, unpack: Any, length: Any) -> Wanted:
        """The arguments as they were given; `ArgumentError` for those that mean nothing."""
        if isinstance(datasets, str):
            raise ArgumentError(f"datasets takes a list of names: datasets=[{datasets!r}], or group={datasets!r} for bare rows")
        if datasets is not None and not (isinstance(datasets, Sequence) and all(isinstance(name, str) for name in datasets)):
            raise ArgumentError(f"datasets takes a list of names, got {datasets!r}")
        if datasets is not None and not datasets:
            raise ArgumentError("datasets is empty: name at least one, or leave it out to read all")
        if not isinstance(unpack, bool):
            raise ArgumentError(f"unpack takes True or False, got {unpack!r}")
        names = None if datasets is None else tuple(datasets)
        axes = {str(name): integer("axis", place) for name, place in axis.items()} if isinstance(axis, Mapping) else None
        count = None if length is None else integer("length", length, 1)
        return cls(names, integer("axis", axis) if axes is None else axes, unpack, count)

    def axis_of(self, name: str) -> int:
        """The axis along which the samples of a dataset lie."""
        return self.axis.get(name, 0) if isinstance(self.axis, dict) else self.axis


# A dataset, the name under which it was sought, and the fields of it that were.
Item = tuple["h5py.Dataset", str, tuple[str, ...]]


@dataclass(frozen=True)
class Choice:
    """What a source reads of one group, or one dataset: `layouts` by name, and for each leaf its dataset and what it becomes.

    `packed` names the datasets whose numbers stand for others, and are not unpacked.
    """

    path: str
    group: str
    bare: bool
    length: int
    layouts: dict[str, Layout]
    columns: dict[str, tuple[str, Column]]
    packed: frozenset[str]

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.group or '/'!r} in {self.path!r}"

    def blank(self) -> Tree:
        """What no rows become: the structure, dtypes and shapes of elements."""
        return self.element({name: column.blank() for name, (_, column) in self.columns.items()})

    def element(self, leaves: dict[str, Any]) -> Tree:
        """What was read by name, as elements have it."""
        return leaves[""] if self.bare else leaves


def choose(
    file: h5py.File, path: str, group: str | None, wanted: Wanted, *, root: str | None = None, mappable: bool = True
) -> Choice:
    """What a source over a group, or a dataset, of an open file reads; `DataError` where that cannot be."""
    name = (group or "").strip("/")
    base, fields = _located(file, path, group, root)
    import h5py

    bare = isinstance(base, h5py.Dataset) and wanted.datasets is None
    if isinstance(base, h5py.Dataset):
        if wanted.datasets is not None and not base.dtype.names:
            raise ArgumentError(f"{group!r} is a dataset: give its group, or leave datasets= out")
        if isinstance(wanted.axis, dict):
            raise ArgumentError(f"{group!r} is a dataset: axis takes an int, got {wanted.axis!r}")
    if bare:
        items: dict[str, Item] = {"": (base, _parent(name, fields), fields)}
    elif wanted.datasets is None:
        items = {
            member: (dataset, f"{name}/{member}", ())
            for member, dataset in _members(base, file, path, name, f"{group or '/'!r} in {path!r}", root).items()
        }
    else:
        items = {}
        for member in wanted.datasets:
            item, fields = _located(file, path, f"{name}/{member}", root)
            items[member] = (dataset_of(item, path, member), _parent(f"{name}/{member}", fields), fields)
    return _choice(items, path, name, bare, wanted, mappable, file.swmr_mode)


def _choice(items: dict[str, Item], path: str, group: str, bare: bool, wanted: Wanted, mappable: bool, growing: bool) -> Choice:
    layouts: dict[str, Layout] = {}
    columns: dict[str, tuple[str, Column]] = {}
    packed = set()
    for key, (dataset, name, fields) in items.items():
        # Names as they are sought, not as the items call themselves: behind a link, that is a place in another file.
        name = name.strip("/")
        within = _parent(key, fields)
        where = f"dataset {name!r} in {path!r}"
        if name not in layouts:
            layouts[name] = _layout(dataset, path, name, wanted.axis_of(within), mappable, bare)
        with intact(f"the attributes of {where}"):
            packing = Packing.of(dataset, where) if wanted.unpack and not fields else None
            if packing is None and is_packed(dataset):
                packed.add(key)
        columns[key] = (name, Column(layouts[name], where, fields, packing, key))
    if isinstance(wanted.axis, dict):
        unknown = wanted.axis.keys() - {_parent(key, column.fields) for key, (_, column) in columns.items()}
        if unknown:
            raise ArgumentError(f"axis names {sorted(unknown)}, which are not read: there are {sorted(columns)}")
    length = _length(path, group, layouts, wanted.length, growing)
    return Choice(path, group, bare, length, layouts, columns, frozenset(packed))


def _layout(dataset: h5py.Dataset, path: str, name: str, axis: int, mappable: bool, bare: bool) -> Layout:
    try:
        return layout_of(dataset, path, name, axis, mappable)
    except DataError as error:
        if bare:
            raise
        raise DataError(f"{error}; choose others with datasets=[…]") from error


def _parent(name: str, fields: tuple[str, ...]) -> str:
    """The name of the dataset whose field this is."""
    return name.removesuffix("/".join(fields)).rstrip("/") if fields else name


def _located(file: h5py.File, path: str, name: str | None, root: str | None) -> tuple[Any, tuple[str, ...]]:
    """The group or dataset called `name`, or the dataset and the fields that end the name."""
    import h5py

    try:
        return found(file, path, name, root=root), ()
    except DataError:
        # Nothing lies below a dataset, so what follows its name can only be fields.
        parts = (name or "").strip("/").split("/")
        for place in range(len(parts) - 1, 0, -1):
            parent = "/".join(parts[:place])
            try:
                item = found(file, path, parent, root=root)
            except DataError:
                continue
            if isinstance(item, h5py.Dataset) and item.dtype.names:
                return item, _fields(item.dtype, path, parent, "/".join(parts[place:]))
        raise


def _fields(dtype: np.dtype, path: str, name: str, rest: str) -> tuple[str, ...]:
    """The fields that the rest of a name leads through."""
    fields: list[str] = []
    while rest:
        # Fields' names may have slashes of their own.
        field = next((known for known in dtype.names or () if rest == known or rest.startswith(f"{known}/")), None)
        if field is None:
            held = ", ".join(map(repr, dtype.names)) if dtype.names else f"{dtype} numbers, no fields"
            raise DataError(f"{'/'.join([name, *fields])!r} in {path!r} has no field {rest!r}: it has {held}")
        fields.append(field)
        dtype, rest = dtype[field].base, rest[len(field) + 1 :]
    return tuple(fields)


# What netCDF writes for a dimension that has no coordinates of its own.
_NO_VARIABLE = b"This is a netCDF dimension but not a netCDF variable"


def _members(base: Any, file: h5py.File, path: str, prefix: str, where: str, root: str | None) -> dict[str, h5py.Dataset]:
    """The datasets that lie directly in a group; what cannot be opened might be one, and is an error."""
    import h5py

    members = {}
    with intact(where):
        for name in map(os.fsdecode, base) if isinstance(base, h5py.Group) else ():
            try:
                item = found(file, path, f"{prefix}/{name}", root=root)
            except DataError as error:
                place = f"{prefix}/{name}".lstrip("/")
                raise DataError(f"{place!r} in {path!r} cannot be opened: choose others with datasets=[…] ({error})") from error
            if isinstance(item, h5py.Dataset) and not np.bytes_(item.attrs.get("NAME", b"")).startswith(_NO_VARIABLE):
                members[name] = item
        if not members:
            raise DataError(f"{where} holds no datasets, but {listing(base)}: name a group with group=…")
    return members


def _length(path: str, group: str, layouts: dict[str, Layout], length: int | None, growing: bool) -> int:
    """The number of samples that the datasets share: the first `length`, or of growing ones, those that all have."""
    lengths = {name: layout.length for name, layout in layouts.items()}
    listed = ", ".join(f"{name!r}: {held}" for name, held in lengths.items())
    if length is not None:
        if min(lengths.values()) < length:
            raise DataError(f"length={length} asks for more samples than there are in {path!r} ({listed})")
        return length
    if len(set(lengths.values())) > 1 and not growing:
        raise DataError(
            f"the datasets in {path!r} differ in length ({listed}): choose with datasets=[…], or read the first of each with "
            f"length=…; {_stretched(path, group, layouts)}"
        )
    return min(lengths.values())


def _stretched(path: str, group: str, layouts: dict[str, Layout]) -> str:
    """How datasets are read whose numbers lie end to end, and are cut by others."""
    if {"data", "indices", "indptr"} <= {name.rpartition("/")[2] for name in layouts}:
        return f"a sparse matrix is read by functrain.csr({path!r}, {group!r})"
    return "values that lie end to end, with offsets, by functrain.ragged"


def agreeing(choices: Sequence[Choice]) -> None:
    """Raise `DataError`, which names two, unless elements of all are alike in structure, dtype and shape."""
    first, *rest = choices
    model = first.blank()
    for other in rest:
        differ = disagreement(model, other.blank())
        if differ:
            raise DataError(
                f"{first.where} and {other.where} disagree ({differ}): choose with datasets=[…], or read them apart"
            )
