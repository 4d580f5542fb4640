"""What the layout of a file costs, and what a better one would give, measured on the file."""

from __future__ import annotations

import math
import os
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from functrain.core.errors import ArgumentError, DataError
from functrain.data.h5.columns import kind
from functrain.data.h5.concerns import SMALL
from functrain.data.h5.files import dataset_of, found, intact, opened
from functrain.data.h5.filters import Pipeline
from functrain.data.h5.index import grid_of
from functrain.data.h5.measuring import Extent, Speeds, by_functrain, by_h5py
from functrain.data.h5.members import members
from functrain.data.h5.sequences import numbers_in
from functrain.data.h5.verdict import Figures, sentence, table
from functrain.data.h5.virtual import check_virtual
from functrain.data.h5.write import h5write
from functrain.data.source import integer

if TYPE_CHECKING:
    import h5py

# Read of each dataset, of all of them together, and measured of how many.
_SAMPLE, _TOGETHER, _MOST = 1 << 23, 1 << 25, 8
# What a chunk costs at least, as if it had so many bytes.
_CHUNK = 1 << 11
_ZSTD = 32015


class DatasetAdvice(NamedTuple):
    """One dataset: the layout at hand first, then others, and a sentence on what to do."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks_per_sample: int
    figures: tuple[Figures, ...]
    advice: str


class Advice(NamedTuple):
    """The datasets of a file that were measured, the largest first, and the names of those that were not."""

    path: str
    batch: int
    datasets: tuple[DatasetAdvice, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}, random batches of {self.batch}"]
        for each in self.datasets:
            lines += ["", f"{each.name} {each.shape} {each.dtype}", *table(each.figures), each.advice]
        if self.left_out:
            lines += ["", f"not measured: {', '.join(self.left_out)}"]
        return "\n".join(lines)


def h5advice(path: str | os.PathLike[str], group: str | None = None, *, batch: int = 128, seconds: float = 2.0) -> Advice:
    """What the layout of datasets `(N, …)` costs, and what other layouts would give, measured on the file.

    A sample of each dataset (8 MiB, less of many; at least what one chunk of rows holds) is read as it lies, and written to a
    temporary file in other layouts: contiguous, and whole rows in chunks of 1 MiB with lzf, gzip or zstd (where its filter is
    there). `print` shows a table: bytes on disk for the whole dataset, MB/s in order, rows/s in random batches of `batch`, by
    functrain and by h5py, on one thread, out of the page cache; and a sentence of advice: another layout if random rows are
    read at least 1.3 times as fast, or it takes at least 20 % less at about the same speed. The eight largest datasets are
    measured, for about `seconds` in all.

    - `group`: a group, or a dataset; default all of the file.

    Raises `DataError` for a file that cannot be read, or has no datasets with rows, and `ArgumentError` for sizes below 1.

    >>> import functrain as ft, numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> ft.h5write(folder.name + "/a.h5", {"x": np.zeros((2000, 8, 8), "f4")}, chunks=(2000, 1, 1))
    >>> advice = ft.h5advice(folder.name + "/a.h5", seconds=0.1)
    >>> advice.datasets[0].chunks_per_sample
    64
    >>> folder.cleanup()
    """
    target = os.fspath(path)
    batch = integer("batch", batch, 1)
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ArgumentError(f"seconds must be a number above 0, got {seconds!r}")
    with opened(target) as file:
        chosen = sorted(_chosen(file, target, group), key=lambda item: -item[1].nbytes)
        names = [name for name, _ in chosen]
        most = min(_SAMPLE, _TOGETHER // len(chosen[:_MOST]))
        samples = [_sampled(dataset, target, name, batch, most) for name, dataset in chosen[:_MOST]]
    # The file is closed now: an open dataset keeps chunks, which h5py would be measured with.
    # Two speeds by two readers, for each layout; the other half of the time goes into writing.
    share = seconds / 2 / (len(samples) * 4 * (1 + len(_candidates())))
    with tempfile.TemporaryDirectory() as folder:
        advised = [_advised(sample, target, f"{folder}/sample.h5", share) for sample in samples]
    return Advice(target, batch, tuple(advised), tuple(names[_MOST:]))


def _chosen(file: h5py.File, path: str, group: str | None) -> list[tuple[str, h5py.Dataset]]:
    import h5py

    base = found(file, path, group)
    if isinstance(base, h5py.Group):
        inside = (group or "").strip("/")
        prefix = f"/{inside}/" if inside else "/"
        with intact(repr(path)):
            named = [(name, item) for name, item in members(file, path).datasets.items() if name.startswith(prefix)]
    else:
        named = [(f"/{(group or '').strip('/')}", dataset_of(base, path, group or ""))]
    rows = [(name, item) for name, item in named if item.shape and item.size]
    if not rows:
        raise DataError(f"{group or '/'!r} in {path!r} holds no datasets (N, …) with rows: there is nothing to measure")
    return rows


# --- one dataset ---------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """Rows of a dataset, and what is to be known of it when its file is closed again."""

    name: str
    shape: tuple[int, ...]
    size: int
    at_hand: str
    stored: int
    chunked: bool
    beside: int
    extent: Extent
    rows: Any

    @property
    def varies(self) -> bool:
        """Whether elements have a length of their own: strings, sequences."""
        return bool(self.rows.dtype.hasobject)


def _sampled(dataset: h5py.Dataset, path: str, name: str, batch: int, most: int) -> _Sample:
    with intact(f"dataset {name!r} in {path!r}"):
        check_virtual(dataset)
        extent, beside = _extent(dataset, batch, most)
        rows = dataset[extent.start : extent.start + extent.rows]
        chunks = dataset.chunks
        text = f"as it is: {'x'.join(map(str, chunks))}, {Pipeline.of(dataset)}" if chunks else "as it is: not chunked"
        stored = dataset.id.get_storage_size()
    return _Sample(name, dataset.shape, dataset.nbytes, text, stored, chunks is not None, beside, extent, rows)


def _advised(sample: _Sample, path: str, scratch: str, seconds: float) -> DatasetAdvice:
    extent, whole = sample.extent, sample.shape[0]
    figures = [_figures(sample.at_hand, None, sample.stored, path, sample.name, extent, whole, seconds, sample.varies)]
    for layout, options in _candidates() if _worthwhile(sample) else ():
        if layout == "contiguous" and not sample.chunked:
            continue
        h5write(scratch, {"x": sample.rows}, overwrite=True, **options)
        with opened(scratch) as file:
            run = file["x"].chunks[0] if file["x"].chunks else 1
            stored = round(file["x"].id.get_storage_size() / sample.rows.nbytes * sample.size)
        there = Extent(0, extent.rows, run, extent.batch, extent.size)
        figures.append(_figures(layout, options, stored, scratch, "x", there, whole, seconds))
    advice = sentence(figures, sample.beside, sample.chunked, numbers_in(sample.rows.dtype) is not None)
    return DatasetAdvice(sample.name, sample.shape, kind(sample.rows.dtype), sample.beside, tuple(figures), advice)


def _extent(dataset: h5py.Dataset, batch: int, most: int) -> tuple[Extent, int]:
    """The rows to look at, in the middle of the dataset, and how many chunks a row lies in."""
    size = max(1, dataset.nbytes // len(dataset))
    chunks = dataset.chunks or (1, *dataset.shape[1:])
    beside = math.prod(grid_of(dataset.shape[1:], chunks[1:]))
    run = min(chunks[0], len(dataset))
    # Whatever of a chunk is looked at, all of it is decoded.
    decoded = max(math.prod(chunks) * dataset.dtype.itemsize, _CHUNK) * beside
    fit = max(1, most // size)
    if dataset.chunks is not None:
        fit = min(fit, run * max(1, most // decoded)) if decoded > most else run * (most // decoded)
    rows = min(len(dataset), fit)
    start = (len(dataset) - rows) // 2
    return Extent(start - start % run, rows, run, batch, size), beside


def _figures(
    layout: str,
    options: dict[str, Any] | None,
    stored: int,
    path: str,
    name: str,
    extent: Extent,
    whole: int,
    seconds: float,
    varies: bool = False,
) -> Figures:
    # Batches are of elements of one length.
    ours = Speeds(None, None) if varies else by_functrain(path, name, extent, whole, seconds)
    theirs = by_h5py(path, name, extent, whole, seconds)

    def scaled(speeds: Speeds) -> float | None:
        return None if speeds.in_order is None else speeds.in_order * extent.size

    return Figures(layout, options, stored, scaled(ours), ours.at_random, scaled(theirs), theirs.at_random)


def _candidates() -> list[tuple[str, dict[str, Any]]]:
    import h5py

    layouts: list[tuple[str, dict[str, Any]]] = [
        ("contiguous", {"layout": "contiguous"}),
        ("rows, shuffle+lzf", {"shuffle": True, "compression": "lzf"}),
        ("rows, shuffle+gzip", {"shuffle": True, "compression": "gzip"}),
    ]
    if h5py.h5z.filter_avail(_ZSTD):
        layouts.append(("rows, shuffle+zstd", {"shuffle": True, "compression": _ZSTD}))
    return layouts


def _worthwhile(sample: _Sample) -> bool:
    """Whether another layout may be of use to a dataset, and can be written."""
    return sample.rows.dtype.kind in "biufcSV" and not sample.varies and sample.size >= SMALL


__all__ = ["Advice", "DatasetAdvice", "Figures", "h5advice"]
