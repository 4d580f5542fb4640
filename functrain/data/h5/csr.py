"""A source over the rows of a sparse matrix in an HDF5 file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from functrain.core.errors import ArgumentError, DataError
from functrain.core.explain import Stage
from functrain.core.tree import Tree
from functrain.data.arguments import places
from functrain.data.budget import Budget
from functrain.data.h5.access import Access
from functrain.data.h5.choose import Wanted, choose
from functrain.data.h5.files import dataset_of, found, intact
from functrain.data.h5.many import Path, text_of
from functrain.data.h5.rows import HDF5
from functrain.data.h5.shelf import FileSource, Shelf, identity
from functrain.data.ragged import Ragged, checked
from functrain.data.runs import Runs

if TYPE_CHECKING:
    import h5py


def csr(
    path: Path,
    group: str,
    *,
    threads: int = 1,
    memory: int | str | Budget = "512 MiB",
    root: Path | None = None,
    storage: Mapping[str, Any] | None = None,
) -> FileSource:
    """A source over the rows of a compressed sparse matrix `(N, F)`, as in .h5ad files and those of 10x Genomics.

    `group` holds data and indices `(nnz,)` and indptr `(N+1,)`: "X" or "layers/counts" of an AnnData file, "matrix" of a
    10x one (which is features × cells by columns, so that an element is a cell). Element i is the dense row `(F,)`; numbers
    with the same place are added. A batch is one read of data and indices. The other arguments are those of `hdf5`.

    Raises `DataError` where the group is no such matrix, for one by columns (csc), and at the row that shows it for indices
    outside 0 … F−1.

    >>> import functrain as ft, h5py, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with h5py.File(folder.name + "/a.h5ad", "w") as file:
    ...     file["X/data"], file["X/indices"], file["X/indptr"] = [5.0, 6.0, 7.0], [0, 2, 1], [0, 2, 2, 3]
    ...     file["X"].attrs.update({"encoding-type": "csr_matrix", "shape": [3, 4]})
    >>> with ft.csr(folder.name + "/a.h5ad", "X") as source:
    ...     source.batch(3)(0).tolist()
    [[5.0, 0.0, 6.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]]
    >>> folder.cleanup()
    """
    if not isinstance(group, str):
        raise ArgumentError(f"group takes the name of a sparse matrix, got {group!r}")
    access = Access.of(threads, memory, False, root, storage)
    source = CSR(text_of(path), group, access)
    source.again = partial(CSR, source.path, group, access)
    return source


class CSR(FileSource):
    """Dense rows of a sparse matrix."""

    ragged = False

    def __init__(self, path: str, group: str, access: Access) -> None:
        self.path, self.group = path, group
        self._where = f"matrix {group!r} in {path!r}"
        with access.opened(path) as file:
            seen = identity(path)
            shape = _shape(file, path, group, self._where, access.root)
            name = f"{group.strip('/')}/indptr"
            with intact(self._where):
                offsets = dataset_of(found(file, path, name, root=access.root), path, name)[:]
            wanted = Wanted.of(["data", "indices"], 0, False, None)
            choice = choose(file, path, group, wanted, root=access.root, mappable=access.mappable(path))
        self.length, self.width = _checked_shape(shape, offsets, choice.length, self._where)
        for member, kinds in (("data", "biufc"), ("indices", "iu")):
            layout = choice.layouts[choice.columns[member][0]]
            if layout.row_shape or layout.dtype.kind not in kinds:
                held = f"{layout.dtype} of shape {layout.shape}"
                raise DataError(f"dataset {layout.name!r} in {path!r} holds {held}: expected numbers (nnz,)")
        self._shelf = Shelf(access, {path: seen})
        flat = HDF5(choice, self._shelf)
        flat.open()
        self.stored = choice.length
        self._entries = Ragged(flat, offsets)
        self.inner = (flat,)

    def get(self, i: int, epoch: int) -> Tree:
        return self.take(np.array([i]), epoch)[0]

    def take(self, indices: np.ndarray, epoch: int) -> Tree:
        indices = places(indices, len(self))
        entries = self._entries.rows(indices, epoch)
        lengths = torch.from_numpy(self._entries.lengths[indices])
        columns = entries["indices"].to(torch.int64)
        outside = (columns < 0) | (columns >= self.width)
        rows = torch.repeat_interleave(torch.arange(len(indices)), lengths)
        if outside.any():
            first = int(outside.nonzero()[0])
            raise DataError(
                f"{self._where} is damaged: row {int(indices[int(rows[first])])} has a number in column {int(columns[first])}, "
                f"and there are {self.width}"
            )
        dense = torch.zeros(len(indices) * self.width, dtype=entries["data"].dtype)
        _add(dense, rows * self.width + columns, entries["data"])
        return dense.reshape(len(indices), self.width)

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        self._entries.announce(indices, epoch)

    def runs(self) -> Runs | None:
        return self._entries.runs()

    def explain(self) -> Stage:
        return Stage("csr", self.facts(), [source.explain() for source in self.inner])

    def facts(self) -> dict[str, str]:
        share = self.stored / (len(self) * self.width)
        stored = f"{self.stored:,} numbers of {len(self):,} × {self.width:,} ({share:.2%}), made dense when read"
        return {"file": self.path, "group": self.group, **super().facts(), "matrix": stored}


# torch adds no unsigned integers but uint8; addition is the same in signed ones of that width.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64, torch.bool: torch.uint8}


def _add(dense: Tensor, places: Tensor, numbers: Tensor) -> None:
    """Add each number to its place; of bools, True stays True."""
    kind = _SIGNED.get(dense.dtype, dense.dtype)
    if dense.dtype == torch.bool:
        dense[places[numbers]] = True
    else:
        dense.view(kind).index_add_(0, places, numbers.view(kind))


def _shape(file: h5py.File, path: str, group: str, where: str, root: str | None) -> tuple[int, int]:
    """The rows and columns of the matrix that the group describes."""
    import h5py

    item = found(file, path, group, root=root)
    with intact(where):
        missing = [name for name in ("data", "indices", "indptr") if not isinstance(item, h5py.Group) or name not in item]
        if missing:
            raise DataError(f"{group!r} in {path!r} is no sparse matrix, for want of {', '.join(missing)}: read it with hdf5()")
        kind = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", "csr"))
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        if not kind.startswith("csr"):
            raise DataError(
                f"{where} is stored by columns ({kind}), so that a row is everywhere in it: store it by rows, with anndata "
                "adata.X = adata.X.tocsr() before adata.write_h5ad(…)"
            )
        shape = item.attrs.get("shape", item.attrs.get("h5sparse_shape"))
        if shape is not None:
            rows, columns = (int(size) for size in shape)
            return rows, columns
        if "shape" in item:
            # 10x keeps features × cells by columns, which is cells × features by rows.
            features, cells = (int(size) for size in item["shape"][:])
            return cells, features
    raise DataError(f"{where} does not tell its shape, neither as an attribute (AnnData) nor as a dataset (10x)")


def _checked_shape(shape: tuple[int, int], offsets: np.ndarray, stored: int, where: str) -> tuple[int, int]:
    rows, columns = shape
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) != rows + 1 or rows < 1 or columns < 1:
        raise DataError(
            f"{where} has {rows} rows and {columns} columns, and an indptr of {offsets.dtype} and shape {offsets.shape}: "
            f"expected ints ({rows + 1},), and at least one row and column"
        )
    try:
        checked(offsets, stored)
    except ValueError as error:
        raise DataError(f"indptr of {where} is damaged: {error}") from error
    return shape
