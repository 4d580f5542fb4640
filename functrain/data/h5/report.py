"""What a look at an HDF5 file has found, as text too."""

from __future__ import annotations

from typing import NamedTuple

from functrain.core.explain import readable

COLUMNS = ("dataset", "shape", "dtype", "layout", "filters", "size", "ratio", "way", "MB/s")
# Those that are numbers, to be written to the right.
NUMBERS = ("size", "ratio", "MB/s")


class DatasetReport(NamedTuple):
    """One dataset: `size` is that of all its elements, `stored` what they take in the file, both in bytes.

    `way` is "mmap", "direct" or "h5py" with the `reason` for it, both empty where it is no source of samples; `speed` is in
    bytes a second, decoded, None where it was not measured. `packed` numbers stand for others, which `unpack=True` gives.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    layout: str
    filters: str
    size: int
    stored: int
    way: str
    reason: str
    speed: float | None
    attributes: dict[str, str]
    packed: bool
    link: str | None
    warnings: tuple[str, ...]
    hash: str | None

    @property
    def ratio(self) -> float | None:
        """How many times smaller the dataset is in the file; None where nothing is stored."""
        return self.size / self.stored if self.stored else None


class GroupReport(NamedTuple):
    """One group: how many datasets and groups lie directly in it; `link` where it is one that was not entered."""

    name: str
    datasets: int
    groups: int
    attributes: dict[str, str]
    link: str | None
    warnings: tuple[str, ...]


class Report(NamedTuple):
    """What a file, or a group of it, holds; `broken` are names that cannot be opened, with the reason."""

    path: str
    size: int
    groups: tuple[GroupReport, ...]
    datasets: tuple[DatasetReport, ...]
    broken: tuple[tuple[str, str], ...]

    def title(self) -> str:
        """The file, its size, and how many datasets it holds."""
        return _plain(f"{self.path}: {readable(self.size)}, {len(self.datasets)} datasets")

    def table(self) -> list[tuple[str, ...]]:
        """The cells of a table of datasets, row by row: `COLUMNS`."""
        return [tuple(map(_plain, _cells(each))) for each in self.datasets]

    def sections(self) -> list[tuple[str, list[str]]]:
        """What the table has no room for: titles, each with its lines."""
        datasets = self.datasets
        objects: list[GroupReport | DatasetReport] = [*self.groups, *datasets]
        told = {_named(each): ", ".join(f"{name} = {value}" for name, value in each.attributes.items()) for each in objects}
        groups = [f"{_named(each)}: {each.datasets} datasets, {each.groups} groups" for each in self.groups if not each.link]
        sections = [
            ("groups", groups if len(self.groups) > 1 else []),
            ("why this way", [f"{each.name}: {each.reason}" for each in datasets if each.reason]),
            ("links", [f"{each.name} {each.link}" for each in objects if each.link]),
            ("attributes", [f"{name}: {text}" for name, text in told.items() if text]),
            ("packed: unpack=True gives what the numbers stand for", [_named(each) for each in datasets if each.packed]),
            ("content hashes (SHA-256)", [f"{each.hash}  {each.name}" for each in datasets if each.hash]),
            ("cannot be opened", [f"{name}: {text}" for name, text in self.broken]),
            ("warnings", [f"{_named(each)}: {text}" for each in objects for text in each.warnings]),
        ]
        return [(title, list(map(_plain, lines))) for title, lines in sections if lines]

    def __str__(self) -> str:
        lines = [self.title()]
        if self.datasets:
            rows = [COLUMNS, *self.table()]
            widths = [max(map(len, column)) for column in zip(*rows)]
            for row in rows:
                cells = zip(COLUMNS, row, widths)
                text = "  ".join(cell.rjust(width) if name in NUMBERS else cell.ljust(width) for name, cell, width in cells)
                lines.append(text.rstrip())
        for title, told in self.sections():
            lines += ["", title, *(f"  {line}" for line in told)]
        return "\n".join(lines)


def _cells(each: DatasetReport) -> tuple[str, ...]:
    # The number of dimensions tells a scalar from an empty dataspace.
    shape = "null" if each.shape is None else "×".join(map(str, each.shape)) or "scalar"
    ratio = f"{each.ratio:.1f}" if each.ratio is not None and each.filters else ""
    speed = f"{each.speed / 1e6:,.0f}" if each.speed is not None else ""
    return _named(each), shape, each.dtype, each.layout, each.filters, readable(each.size), ratio, each.way, speed


def _named(each: GroupReport | DatasetReport) -> str:
    return each.name or "/"


def _plain(text: str) -> str:
    """Text as it is to be read: names and attributes may hold what a terminal would take for commands, or cannot show."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


__all__ = ["COLUMNS", "NUMBERS", "DatasetReport", "GroupReport", "Report"]
