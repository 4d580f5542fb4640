"""Where the links of an HDF5 file lead: in circles, to what must not be opened, or out of a folder."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from functrain.core.errors import DataError

if TYPE_CHECKING:
    import h5py

# As many as HDF5 follows.
_MOST = 16


def check_regular(path: str, link: str = "") -> None:
    """Raise `DataError` for what is there and is no regular file: to open a FIFO is to wait until somebody writes to it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise DataError(f"{link}{path!r} is {kind}, not an HDF5 file")


@dataclass
class Walk:
    """Follows the links of a file as HDF5 would, before HDF5 does.

    HDF5 waits for ever at an external link to a FIFO, and dies of virtual datasets that are their own sources (SIGSEGV,
    HDF5 2.0). `root` is the folder that files behind links must lie in; None for any. What replaces a file between this look
    and HDF5's own is not noticed.
    """

    root: str | None
    # The links that were followed, in words.
    trail: list[str] = field(default_factory=list)
    # The files that were found behind them.
    files: set[str] = field(default_factory=set)
    _virtual: list[tuple[str, int]] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set)

    # --- links -----------------------------------------------------------------------------------------------

    def links(self, file: h5py.File, name: str) -> None:
        """Follow the links on the way to `name`, in other files too.

        Raises `DataError` for circles, for external links to what is not there, is no HDF5 file, or lies outside the root.
        What is missing in a file that is there is left for HDF5 to find.
        """
        import h5py

        done: list[str] = []
        pending = _parts(name)
        while pending:
            part = pending.pop(0)
            here = "/".join([*done, part])
            try:
                kind = file.id.links.get_info(in_bytes(here)).type
                value = None if kind == h5py.h5l.TYPE_HARD else file.id.links.get_val(in_bytes(here))
            except (KeyError, RuntimeError, OSError, ValueError, NotImplementedError):
                return
            if kind == h5py.h5l.TYPE_HARD:
                done.append(part)
                continue
            self._count(file, here)
            if kind == h5py.h5l.TYPE_SOFT and isinstance(value, bytes):
                target = os.fsdecode(value)
                done = [] if target.startswith("/") else done
                pending = _parts(target) + pending
            elif kind == h5py.h5l.TYPE_EXTERNAL and isinstance(value, tuple):
                other, target = map(os.fsdecode, value)
                self._external(file, here, other, "/".join([target, *pending]))
                return
            else:
                return

    def _count(self, file: h5py.File, link: str) -> None:
        step = f"{'/' + link!r} in {file.filename!r}"
        self.trail.append(step)
        if len(self.trail) > _MOST:
            first = self.trail.index(step)
            if first < len(self.trail) - 1:
                circle = " → ".join(self.trail[first : self.trail.index(step, first + 1) + 1])
                raise DataError(f"the link {step} leads in a circle: {circle}")
            raise DataError(f"the link {self.trail[0]} leads through more than {_MOST} links: name what it leads to")

    def _external(self, file: h5py.File, link: str, other: str, name: str) -> None:
        from functrain.data.h5.files import opened

        where = f"the external link {'/' + link!r} in {file.filename!r}"
        paths = self._sought(file, other, where, "HDF5_EXT_PREFIX")
        if not paths:
            raise DataError(f"{where} leads to {other!r}, which is neither beside it nor in the working folder")
        with opened(paths[0]) as next_file:
            self.links(next_file, name)

    # --- bytes that lie in other files -----------------------------------------------------------------------

    def storage(self, dataset: h5py.Dataset, name: str) -> None:
        """Look at the files that hold a dataset's bytes, those of virtual datasets behind it too.

        Raises `DataError` for a circle of virtual datasets, for what is no regular file, or lies outside the root.
        """
        import h5py

        where = f"dataset {name!r} in {dataset.file.filename!r}"
        plist = dataset.id.get_create_plist()
        for number in range(plist.get_external_count()):
            other = os.fsdecode(plist.get_external(number)[0])
            self._sought(dataset.file, other, f"the external storage of {where}", "HDF5_EXTFILE_PREFIX", beside=False)
        if plist.get_layout() == h5py.h5d.VIRTUAL:
            self._sources(dataset, where)

    def _sources(self, dataset: h5py.Dataset, where: str) -> None:
        place = _place(dataset)
        if place in self._virtual:
            raise DataError(f"{where} is virtual, and leads in a circle: it is among its own sources")
        self._virtual.append(place)
        if len(self._virtual) > _MOST:
            raise DataError(f"{where} lies behind more than {_MOST} virtual datasets: name one that is nearer to the data")
        for other, names in virtual_files(dataset).items():
            self._source(dataset, other, names, f"a source of the virtual {where}")
        self._virtual.pop()

    def _source(self, dataset: h5py.Dataset, other: str, names: set[str], where: str) -> None:
        from functrain.data.h5.files import opened

        if other == ".":
            self._behind(dataset.file, names)
            return
        for path in self._sought(dataset.file, other, where, "HDF5_VDS_PREFIX"):
            with opened(path) as file:
                self._behind(file, names)

    def _behind(self, file: h5py.File, names: set[str]) -> None:
        import h5py

        for name in (each for name in names for each in _numbered(file, name)):
            inner = Walk(self.root, [], self.files, self._virtual, self._seen)
            inner.links(file, name)
            source = file.get(name)
            if not isinstance(source, h5py.Dataset):
                continue
            place = _place(source)
            if place in self._virtual or place not in self._seen:
                inner.storage(source, name)
            self._seen.add(place)

    # --- where HDF5 looks for a file -------------------------------------------------------------------------

    def _sought(self, file: h5py.File, other: str, where: str, variable: str, beside: bool = True) -> list[str]:
        """The file that HDF5 would open for the name `other`, or all that a pattern stands for; none where there is none."""
        if file.driver == "fileobj":
            raise DataError(
                f"{where} leads to another file, {other!r}, which cannot be followed from a remote file: name that file itself"
            )
        paths = next(filter(None, map(_there, candidates(file.filename, other, variable, beside))), [])
        for path in paths:
            if self.root is not None and not _inside(path, self.root):
                raise DataError(f"{where} leads to {os.path.realpath(path)!r}, outside of root={self.root!r}: not followed")
            check_regular(path, f"{where} leads to ")
        self.files.update(paths)
        return paths


def _there(path: str) -> list[str]:
    """The files that HDF5 finds for a name in which "%b" stands for a number."""
    pattern, count = re.subn("%[0-9]*b", "*", glob.escape(path))
    if count:
        return sorted(glob.glob(pattern.replace("%%", "%")))
    return [found for found in (path, path.replace("%%", "%")) if os.path.exists(found)]


def _numbered(file: h5py.File, name: str) -> Iterator[str]:
    """The names of datasets that a name stands for in which "%b" is a number, counted from 0."""
    if not re.search("%[0-9]*b", name):
        yield name
        return
    for number in itertools.count():
        one = re.sub("%[0-9]*b", str(number), name)
        if file.get(one, getlink=True) is None:
            return
        yield one


def candidates(origin: str, other: str, variable: str, beside: bool = True) -> Iterator[str]:
    """The paths at which HDF5 looks for the file `other` that the file `origin` names, in its order.

    An environment variable holds folders to look in first; external storage is not sought beside the file.
    """
    folder = os.path.dirname(os.path.abspath(origin))
    prefixes = [prefix.replace("${ORIGIN}", folder) for prefix in os.environ.get(variable, "").split(":") if prefix]
    if os.path.isabs(other):
        yield other
        if not beside:
            return
        other = os.path.basename(other)
    for prefix in prefixes:
        yield os.path.join(prefix, other)
    if beside:
        yield os.path.join(folder, other)
    yield other
    if beside:
        yield os.path.join(os.path.dirname(os.path.realpath(origin)), other)


def virtual_files(dataset: h5py.Dataset) -> dict[str, set[str]]:
    """The sources of a virtual dataset: the names of datasets by file, "." for its own."""
    files: dict[str, set[str]] = {}
    for source in dataset.virtual_sources():
        files.setdefault(source.file_name, set()).add(source.dset_name)
    return files


def _place(dataset: h5py.Dataset) -> tuple[str, int]:
    """What a dataset is, by whichever link it was come to."""
    import h5py

    return os.path.realpath(dataset.file.filename), h5py.h5o.get_info(dataset.id).addr


def _inside(path: str, root: str) -> bool:
    whole, top = os.path.realpath(path), os.path.realpath(root)
    return whole == top or whole.startswith(top.rstrip(os.sep) + os.sep)


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def in_bytes(name: str) -> bytes:
    """A name as it stands in a file, where it need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")
