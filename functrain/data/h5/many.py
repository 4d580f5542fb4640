"""Several files, or several groups, as one source."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from functrain.core.errors import ArgumentError, DataError
from functrain.data.concat import Concat
from functrain.data.h5.access import Access
from functrain.data.h5.choose import Choice, Wanted, agreeing, choose
from functrain.data.h5.files import found, intact, listing
from functrain.data.h5.raw import is_url
from functrain.data.h5.rows import HDF5
from functrain.data.h5.shelf import FileSource, Identity, Shelf, identity

if TYPE_CHECKING:
    import h5py

Path = str | os.PathLike[str]


class HDF5Files(FileSource, Concat):
    """The rows of several files or groups, one after the other; `inner` has a source for each."""

    def __init__(self, paths: Sequence[str], group: str | None, wanted: Wanted, access: Access) -> None:
        choices: list[Choice] = []
        identities: dict[str, Identity] = {}
        for path in paths:
            with access.opened(path) as file:
                identities[path] = identity(path)
                choices += [
                    choose(file, path, name, wanted, root=access.root, mappable=access.mappable(path))
                    for name in groups(file, path, group, access.root)
                ]
        agreeing(choices)
        self._shelf = Shelf(access, identities)
        super().__init__([HDF5(choice, self._shelf) for choice in choices])

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "files": f"{len({rows.path for rows in self.inner if isinstance(rows, HDF5)}):,}"}


def paths_of(given: Any) -> tuple[list[str], bool]:
    """The files that are meant, and whether several may be: by a list, or a pattern, whose files come in natural order."""
    if isinstance(given, (str, os.PathLike)):
        path = text_of(given)
        return (_matching(path), True) if _is_pattern(path) else ([path], False)
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ArgumentError(f"path takes the path of a file, a pattern, or a list of them, got {given!r}")
    if not given:
        raise ArgumentError("path is an empty list: name at least one file")
    return [path for each in given for path in paths_of(text_of(each))[0]], True


def text_of(path: Any) -> str:
    """A path as text; `ArgumentError` for what is none."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ArgumentError(f"path takes the path of a file as text, got {path!r}")
    return text


def _is_pattern(path: str) -> bool:
    if is_url(path):
        if "*" in path:
            raise ArgumentError(f"patterns name files on this machine, and {path!r} is a URL: give a list of URLs")
        return False
    # A file may be called like a pattern.
    return glob.has_magic(path) and not os.path.exists(path)


def _matching(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern, recursive=True), key=natural)
    if not paths:
        raise DataError(f"no file matches {pattern!r} (in {os.path.abspath('.')!r})")
    return paths


def natural(name: str) -> tuple[Any, ...]:
    """The key of natural order, folder by folder, in which demo_10 follows demo_9.

    >>> sorted(["demo_10", "demo_9", "demo_09", "demo_"], key=natural)
    ['demo_', 'demo_09', 'demo_9', 'demo_10']
    """
    parts = (re.split(r"([0-9]+)", part) for part in name.split("/"))
    # The name decides between those that are alike; beside the parts, as it is not to be compared with a number.
    return tuple(tuple(int(part) if place % 2 else part for place, part in enumerate(each)) for each in parts), name


def has_pattern(group: str | None) -> bool:
    """Whether the name of a group may stand for several."""
    return group is not None and glob.has_magic(group)


def groups(file: h5py.File, path: str, group: str | None, root: str | None) -> list[str | None]:
    """The groups, or datasets, of a file that a pattern names, in natural order; a name as it is."""
    if group is None or not has_pattern(group):
        return [group]
    parts = group.strip("/").split("/")
    with intact(repr(path)):
        if "\0" not in group and group in file:
            return [group]
        matching = sorted(_walk(file, path, "", parts, root), key=natural)
    if not matching:
        plain = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), parts)) or "/"
        near = listing(found(file, path, plain, root=root))
        raise DataError(f"nothing in {path!r} matches group={group!r}: {plain!r} holds {near}")
    return list(matching)


def _walk(file: h5py.File, path: str, name: str, parts: list[str], root: str | None) -> Iterator[str]:
    """The names below `name` that match a pattern, part by part; what cannot be opened might hold some, and is an error."""
    import h5py

    if not parts:
        yield name
        return
    item = found(file, path, name, root=root)
    if isinstance(item, h5py.Group):
        pattern, *below = parts
        for member in item:
            if member == pattern or fnmatch.fnmatchcase(member, pattern):
                yield from _walk(file, path, f"{name}/{member}".lstrip("/"), below, root)
