"""Virtual datasets: ones that refer to datasets in other files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.files import FAILURES, open_file
from functrain.data.h5.links import Walk, candidates

if TYPE_CHECKING:
    import h5py

    from functrain.data.h5.parts import Joined, Part


def write_virtual(file: h5py.File, joined: Joined, folder: str, fill: Any = None) -> h5py.Dataset:
    """A dataset in `file`, which is to lie in `folder`, that reads as the parts do where they are.

    Sources in that folder, or below it, are found from it: they may be moved together. `fill` stands where there is no part.
    """
    import h5py

    model = joined.model
    dtype = joined.dtype or model.dtype
    layout = h5py.VirtualLayout(joined.shape, dtype)
    for part in joined.parts:
        _check_exact(part, dtype)
        if part.dataset.size:
            name = reference(part.dataset.file.filename, folder)
            source = h5py.VirtualSource(_escaped(name), _escaped(part.dataset.name), part.dataset.shape, part.dataset.dtype)
            layout[part.region] = source
    return file.create_virtual_dataset(joined.name, layout, fillvalue=fill)


def _check_exact(part: Part, dtype: np.dtype) -> None:
    """Raise `DataError` for numbers that HDF5 would round whenever they are read: what they are then, nobody sees."""
    mine = part.dataset.dtype
    # To NumPy it is safe to make floats of 64-bit ints.
    rounded = mine.kind in "iu" and dtype.kind in "fc" and 8 * mine.itemsize > np.finfo(dtype).nmant + 1
    if mine != dtype and (rounded or not np.can_cast(mine, dtype, "safe")):
        raise DataError(
            f"dataset {part.dataset.name!r} in {part.path!r} is {mine}, of which {dtype}, the dtype that all sources share, "
            "does not hold all numbers: convert one of them, or leave virtual=True out, which looks at each number"
        )


def behind(plan: Iterable[Joined]) -> set[str]:
    """The files that the datasets to be joined take their data from: through virtual datasets, however many."""
    walk = Walk(None)
    for joined in plan:
        for part in joined.parts:
            walk.storage(part.dataset, part.dataset.name)
    return walk.files


def reference(path: str, folder: str) -> str:
    """How a virtual dataset in a file in `folder` names the file `path`: from there if it lies in it, else in full.

    >>> reference("/data/parts/a.h5", "/data"), reference("/other/a.h5", "/data")
    ('parts/a.h5', '/other/a.h5')
    """
    whole, folder = os.path.abspath(path), os.path.abspath(folder)
    inside = os.path.commonpath([whole, folder]) == folder
    return os.path.relpath(whole, folder) if inside else whole


def _escaped(name: str) -> str:
    # "%b" stands for a number in the names of sources.
    return name.replace("%", "%%")


def check_virtual(dataset: h5py.Dataset) -> None:
    """Raise `DataError` for a virtual dataset whose sources are not all there, as large as it takes them to be.

    HDF5 reads fill values in place of what is missing, and says nothing. Sources that are virtual themselves are looked
    into; those with a number in their names ("%b") may be as many as there are. Other datasets pass.
    """
    _check(dataset, ())


# As deep as HDF5 follows them.
_DEEPEST = 16


def _check(dataset: h5py.Dataset, above: tuple[str, ...]) -> None:
    import h5py

    if dataset.id.get_create_plist().get_layout() != h5py.h5d.VIRTUAL:
        return
    where = f"virtual dataset {dataset.name!r} in {dataset.file.filename!r}"
    if where in above or len(above) > _DEEPEST:
        raise DataError(f"{where} leads in a circle, or too deep: {' → '.join(above[-3:])}")
    files: dict[str, h5py.File] = {}
    try:
        for name, inner, needed in _sources(dataset):
            file = dataset.file if name == "." else files.get(name)
            if file is None:
                file = files[name] = open_file(_there(dataset, name, where))
            source = _source(file, inner, where)
            if not _enough(source, needed):
                raise DataError(
                    f"{where} takes elements up to {needed} from {inner!r} in {file.filename!r}, which has shape "
                    f"{source.shape}: what is missing would be read as fill values"
                )
            _check(source, (*above, where))
    finally:
        for file in files.values():
            file.close()


# The shape that a source must have at least, its size where it is taken whole, or None where it may have any.
_Needed = tuple[int, ...] | int | None


def _enough(source: h5py.Dataset, needed: _Needed) -> bool:
    if not isinstance(needed, tuple):
        return needed is None or bool(source.size == needed)
    shape = source.shape or ()
    return len(shape) == len(needed) and all(have >= need for have, need in zip(shape, needed))


def _sources(dataset: h5py.Dataset) -> Iterator[tuple[str, str, _Needed]]:
    """The file and name of each source, and what it must hold."""
    import h5py

    plist = dataset.id.get_create_plist()
    for number in range(plist.get_virtual_count()):
        names = plist.get_virtual_filename(number), plist.get_virtual_dsetname(number)
        # What is left of a name without "%%" has a number in it: as many as there are belong to the dataset.
        if any("%" in name.replace("%%", "") for name in names):
            continue
        space, there = plist.get_virtual_srcspace(number), plist.get_virtual_vspace(number)
        name, inner = (name.replace("%%", "%") for name in names)
        try:
            count = there.get_select_npoints()
        except RuntimeError:
            # Without end, of a source that grows: as much as there is.
            count = None
        if count is None or space.get_select_type() == h5py.h5s.SEL_ALL:
            # The file does not hold the shape of a source that is taken whole.
            yield name, inner, count
        elif count and space.get_select_type() == h5py.h5s.SEL_HYPERSLABS:
            yield name, inner, tuple(last + 1 for last in space.get_select_bounds()[1])


def _there(dataset: h5py.Dataset, name: str, where: str) -> str:
    found = [path for path in candidates(dataset.file.filename, name, "HDF5_VDS_PREFIX") if os.path.exists(path)]
    if not found:
        raise DataError(f"{where} takes data from {name!r}, which is not there: it would be read as fill values. Bring it back")
    return found[0]


def _source(file: h5py.File, name: str, where: str) -> Any:
    import h5py

    try:
        source = file[name]
    except FAILURES as error:
        raise DataError(f"{where} takes data from {name!r} in {file.filename!r}, which does not have it ({error})") from error
    if not isinstance(source, h5py.Dataset):
        raise DataError(f"{where} takes data from {name!r} in {file.filename!r}, which is no dataset")
    return source


__all__ = ["behind", "check_virtual", "write_virtual"]
