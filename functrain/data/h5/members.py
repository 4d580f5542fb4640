"""What an HDF5 file holds: its groups and datasets by name, and their attributes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from functrain.core.errors import DataError
from functrain.data.h5.files import FAILURES, intact
from functrain.data.h5.links import Walk

if TYPE_CHECKING:
    import h5py


class Members(NamedTuple):
    """The groups and datasets of one file by full name; links to datasets count as datasets."""

    path: str
    groups: dict[str, Any]
    datasets: dict[str, Any]


def members(file: h5py.File, path: str) -> Members:
    """All groups and datasets of a file; `DataError` for a link that leads nowhere or to a group, and where there are none."""
    import h5py

    found = Members(path, {"/": file["/"]}, {})
    seen = {h5py.h5o.get_info(file.id).addr}
    pending = ["/"]
    while pending:
        group = found.groups[pending.pop()]
        for key in group:
            if isinstance(key, bytes):
                raise DataError(f"{os.fsdecode(key)!r} in {group.name!r} of {path!r} is a name that is not UTF-8: rename it")
            name = f"{group.name.rstrip('/')}/{key}"
            item = _behind(file, name, path)
            if isinstance(item, h5py.Dataset):
                found.datasets[name] = item
            elif isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address in seen or item.file.filename != file.filename:
                    raise DataError(f"{name!r} in {path!r} links to group {item.name!r}: only links to datasets are followed")
                seen.add(address)
                found.groups[name] = item
                pending.append(name)
    if not found.datasets:
        raise DataError(f"{path!r} holds no datasets")
    return found


def _behind(file: h5py.File, name: str, path: str) -> Any:
    Walk(None).links(file, name)
    try:
        return file[name]
    except FAILURES as error:
        raise DataError(f"link {name!r} in {path!r} leads nowhere: {error}") from error


def copy_attributes(origin: Any, target: Any, path: str) -> None:
    """Give `target` the attributes of `origin` in the file at `path`, but for references."""
    import h5py

    with intact(f"the attributes of {origin.name!r} in {path!r}"):
        for key in origin.attrs:
            attribute = origin.attrs.get_id(key)
            inner = [attribute.dtype[field] for field in attribute.dtype.names or ()] + [attribute.dtype]
            inner += [kind for kind in map(h5py.check_vlen_dtype, inner) if isinstance(kind, type(attribute.dtype))]
            # References point into the first file (dimension scales): there is nothing behind them in this one.
            if not any(h5py.check_ref_dtype(kind) for kind in inner):
                target.attrs.create(key, origin.attrs[key], dtype=attribute.dtype)
