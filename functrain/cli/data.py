"""`functrain data inspect FILE`: what a file holds, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from functrain.core.errors import ConfigError, MissingExtraError
from functrain.core.explain import readable
from functrain.data.h5.inspect import DatasetReport, GroupReport, Report, h5inspect

_WIDTH = 160


def add_data_command(commands: Any) -> None:
    """Add `data` and what it offers to the commands of a parser."""
    data = commands.add_parser("data", help="look at data files")
    verbs = data.add_subparsers(required=True, metavar="COMMAND")
    look = verbs.add_parser(
        "inspect",
        allow_abbrev=False,
        help="an HDF5 file's datasets, layout, compression, way to the bytes, speed and hashes",
    )
    look.add_argument("file", help="the path of an HDF5 file, or a URL")
    look.add_argument("--group", help="only this group, and what lies below it")
    look.add_argument("--no-speed", action="store_true", help="do not measure how fast datasets are read")
    look.add_argument("--hashes", action="store_true", help="content hashes too, which a file of up to 64 MiB has anyway")
    look.add_argument("--root", help="a folder out of which links must not lead")
    look.set_defaults(go=_inspect)


def _inspect(options: argparse.Namespace, flags: Sequence[str]) -> int:
    if flags:
        raise ConfigError(f"unknown arguments: {' '.join(flags)}")
    report = h5inspect(
        options.file, options.group, speed=not options.no_speed, hashes=options.hashes or None, root=options.root
    )
    show(report)
    return 0


def show(report: Report) -> None:
    """Print a report: a table of datasets, then what is to be known of them and of groups."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingExtraError.of("rich", "cli", "functrain data inspect") from error
    # Into a file or a pipe, lines are as long as they need to be: a name that is cut short cannot be sought.
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(file=sys.stdout, highlight=False, markup=False, width=width, soft_wrap=False)
    console.print(_plain(f"{report.path}: {readable(report.size)}, {len(report.datasets)} datasets"), soft_wrap=True)
    if report.datasets:
        console.print(_table(report.datasets))
    for title, lines in _sections(report):
        if lines:
            console.print(f"\n{title}")
            for line in lines:
                console.print(_plain(f"  {line}"), soft_wrap=True)


def _table(datasets: Sequence[DatasetReport]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("dataset", "shape", "dtype", "layout", "filters", "size", "ratio", "way", "MB/s")
    for name in columns:
        right = name in ("size", "ratio", "MB/s")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for each in datasets:
        # The number of dimensions tells a scalar from an empty dataspace.
        shape = "null" if each.shape is None else "×".join(map(str, each.shape)) or "scalar"
        ratio = f"{each.ratio:.1f}" if each.ratio is not None and each.filters else ""
        speed = f"{each.speed / 1e6:,.0f}" if each.speed is not None else ""
        cells = (each.name or "/", shape, each.dtype, each.layout, each.filters, readable(each.size), ratio, each.way, speed)
        table.add_row(*map(_plain, cells))
    return table


def _plain(text: str) -> Any:
    """Text as it is to be read: names and attributes may hold what a terminal would take for commands, or cannot show."""
    from rich.text import Text

    return Text("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text))


def _sections(report: Report) -> list[tuple[str, list[str]]]:
    """What the table has no room for, each with its title."""
    datasets = report.datasets
    objects: list[GroupReport | DatasetReport] = [*report.groups, *datasets]
    told = {_named(each): ", ".join(f"{name} = {value}" for name, value in each.attributes.items()) for each in objects}
    groups = [f"{_named(group)}: {group.datasets} datasets, {group.groups} groups" for group in report.groups if not group.link]
    return [
        ("groups", groups if len(report.groups) > 1 else []),
        ("why this way", [f"{each.name}: {each.reason}" for each in datasets if each.reason]),
        ("links", [f"{each.name} {each.link}" for each in objects if each.link]),
        ("attributes", [f"{name}: {text}" for name, text in told.items() if text]),
        ("content hashes (SHA-256)", [f"{each.hash}  {each.name}" for each in datasets if each.hash]),
        ("cannot be opened", [f"{name}: {text}" for name, text in report.broken]),
        ("warnings", [f"{_named(each)}: {text}" for each in objects for text in each.warnings]),
    ]


def _named(each: GroupReport | DatasetReport) -> str:
    return each.name or "/"
