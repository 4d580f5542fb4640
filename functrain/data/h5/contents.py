"""What lies in an HDF5 file, group by group: datasets, groups, and links with where they lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from functrain.core.errors import DataError
from functrain.data.h5.files import FAILURES, found
from functrain.data.h5.links import in_bytes

if TYPE_CHECKING:
    import h5py


class Entry(NamedTuple):
    """One name in a file: the object that it leads to, or why it leads to none.

    `link` tells where a soft or external link leads; None for the object itself.
    """

    name: str
    item: Any
    link: str | None = None
    error: str | None = None


def contents(file: h5py.File, path: str, group: str | None = None, root: str | None = None) -> Iterator[Entry]:
    """All that lies in a group, in the order of names, and in the groups below it; a dataset alone is its only entry.

    Groups behind soft and external links are named, and not entered; nor is a group entered twice. Raises `DataError` where
    the group is missing.
    """
    import h5py

    base = found(file, path, group, root=root)
    if not isinstance(base, h5py.Group):
        yield Entry((group or "").strip("/"), base)
        return
    seen = {h5py.h5o.get_info(base.id).addr}
    # Names from which to go on, the next one last: a deep tree must not exhaust Python's stack.
    pending = _names(base, (group or "").strip("/"))
    while pending:
        entry = _entry(file, path, pending.pop(), root)
        if isinstance(entry.item, h5py.Group) and entry.link is None:
            address = h5py.h5o.get_info(entry.item.id).addr
            try:
                pending += _names(entry.item, entry.name) if address not in seen else []
            except DataError as error:
                entry = Entry(entry.name, None, None, str(error))
            seen.add(address)
        yield entry


def _names(group: h5py.Group, prefix: str) -> list[str]:
    try:
        return [f"{prefix}/{name}".lstrip("/") for name in sorted(map(os.fsdecode, group), reverse=True)]
    except FAILURES as error:
        where = f"{prefix or '/'!r} in {group.file.filename!r}"
        raise DataError(f"{where} cannot be listed, and may be damaged: {error}") from error


def _entry(file: h5py.File, path: str, name: str, root: str | None) -> Entry:
    link = None
    try:
        link = _link(file, name)
        return Entry(name, found(file, path, name, root=root), link)
    except (DataError, *FAILURES) as error:
        return Entry(name, None, link, str(error))


def _link(file: h5py.File, name: str) -> str | None:
    import h5py

    place = in_bytes(name)
    kind = file.id.links.get_info(place).type
    if kind == h5py.h5l.TYPE_SOFT:
        return f"→ {os.fsdecode(file.id.links.get_val(place))}"
    if kind == h5py.h5l.TYPE_EXTERNAL:
        other, target = map(os.fsdecode, file.id.links.get_val(place))
        return f"→ {other}:{target}"
    return None
