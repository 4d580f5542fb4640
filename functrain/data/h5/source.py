"""The source over HDF5 files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from functrain.core.errors import ArgumentError
from functrain.data.budget import Budget
from functrain.data.h5.access import Access
from functrain.data.h5.choose import Wanted, choose
from functrain.data.h5.many import HDF5Files, Path, has_pattern, paths_of
from functrain.data.h5.rows import HDF5
from functrain.data.h5.shelf import FileSource, Shelf, identity


def hdf5(
    path: Path | Sequence[Path],
    group: str | None = None,
    *,
    datasets: Sequence[str] | None = None,
    axis: int | Mapping[str, int] = 0,
    threads: int = 1,
    memory: int | str | Budget = "512 MiB",
    unpack: bool = False,
    length: int | None = None,
    swmr: bool = False,
    root: Path | None = None,
    storage: Mapping[str, Any] | None = None,
) -> FileSource:
    """A source over the datasets `(N, …)` of HDF5 files: element i is `{name: row i}`.

    What is read:

    - `path`: a file, or several: a list, or a pattern such as "data/*.h5". Their rows follow one upon the other, in the order
      of the list, or the natural order of names (demo_9, demo_10). A URL is read through fsspec.
    - `group`: where the datasets lie; default the root. If it names a dataset, elements are its bare rows. A pattern such as
      "data/demo_*" names several, whose rows follow one upon the other; `functrain.episodes` takes them apart again, and
      `.groups` `(N,)` has the number of the file or group of each row.
    - `datasets`: which of them; default all that lie directly in the group. Fields of compounds go by
      "table/field", or by their names alone if `group` is the table; elements have them under the names that were given.
    - `axis`: along which samples lie, for all or by name, `{"x": 1}`; elements lack it. Negative ones count from the end.
    - `length`: the first so many samples; it holds fast where a file grows.

    How:

    - `threads` decode compressed chunks, where rows are read in order those behind them too, ahead of time; they are ended
      by `close`, or with the source.
    - `memory` bounds the decoded chunks that are kept: a size, or a `Budget` that others share.
    - `unpack`: apply netCDF's scale_factor, add_offset, _FillValue, missing_value and valid range; NaN for what is missing.
      Without a _FillValue that is netCDF's default one too (9.97e36 of floats, -32767 of int16, …; bytes have none), of
      floats always, of ints where there is one of these attributes.
    - `swmr`: read files that are being appended to in HDF5's SWMR mode.
    - `root`: a folder out of which links must not lead.
    - `storage`: the options for the file system of a URL, and of its cache.

    Numbers come in native byte order, enums as their ints, compounds as dicts, opaque values as their bytes `(…, n)` uint8,
    sequences of variable length as `(T_i,)` (see `Source.padded`; reading them is how to know their lengths): so encoded
    images are decoded by `.map(lambda b: decode(b.numpy()))`. Contiguous datasets are memory-mapped, chunks are decoded
    outside HDF5's lock where their filters are known, all else goes through h5py; `explain` says which and why. A file is
    opened again in each process that reads, and one of many only while it is used; `close`, or a `with` block, lets go of all.

    Raises `DataError`, which names file and dataset: not there, not HDF5, truncated (also when the file shrinks later), of a
    dtype that torch has not (strings, references), without samples, of unequal lengths, shorter than `length`; for several
    files or groups, a pattern that nothing matches, and two that differ in structure, dtype or shape.

    >>> import functrain as ft, numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"train": {"x": np.zeros((10, 3), "f4"), "y": np.arange(10)}})
    >>> with ft.hdf5(folder.name + "/a.h5", group="train") as source:
    ...     source(3)
    {'x': tensor([0., 0., 0.]), 'y': tensor(3)}
    >>> with ft.hdf5(folder.name + "/*.h5", "train/y") as source:
    ...     source.batch(4)(1)
    tensor([4, 5, 6, 7])
    >>> folder.cleanup()
    """
    access = Access.of(threads, memory, swmr, root, storage)
    wanted = Wanted.of(datasets, axis, unpack, length)
    if group is not None and not isinstance(group, str):
        raise ArgumentError(f"group takes the name of a group or dataset, got {group!r}")
    return _made(path, group, wanted, access)


def _made(path: Path | Sequence[Path], group: str | None, wanted: Wanted, access: Access) -> FileSource:
    """The source over one file or several, one group or several."""
    paths, several = paths_of(path)
    source: FileSource
    if several or has_pattern(group):
        if wanted.length is not None:
            raise ArgumentError("length holds fast the length of one file: give it for each, and join them by functrain.concat")
        source = HDF5Files(paths, group, wanted, access)
    else:
        source = _one(paths[0], group, wanted, access)
    source.again = partial(_made, path, group, replace(wanted, length=None), access)
    return source


def _one(path: str, group: str | None, wanted: Wanted, access: Access) -> HDF5:
    """The source over one group of one file."""
    with access.opened(path) as file:
        seen = identity(path)
        choice = choose(file, path, group, wanted, root=access.root, mappable=access.mappable(path))
    source = HDF5(choice, Shelf(access, {path: seen}))
    source.open()
    return source


__all__ = ["hdf5"]
