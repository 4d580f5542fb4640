"""`functrain data inspect FILE`: what a file holds, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from functrain.cli.printing import printing
from functrain.core.errors import ConfigError, MissingExtraError
from functrain.data.h5.inspect import h5inspect
from functrain.data.h5.report import COLUMNS, NUMBERS, Report

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
    with printing():
        show(report)
    return 0


def show(report: Report) -> None:
    """Print a report: a table of datasets, then what is to be known of them and of groups."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingExtraError.of("rich", "cli", "functrain data inspect") from error
    # Into a file or a pipe, lines are as long as they need to be: a name that is cut short cannot be sought.
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(file=sys.stdout, highlight=False, markup=False, width=width, soft_wrap=False)
    console.print(Text(report.title()), soft_wrap=True)
    if report.datasets:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in COLUMNS:
            right = name in NUMBERS
            table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
        for row in report.table():
            table.add_row(*map(Text, row))
        console.print(table)
    for title, lines in report.sections():
        console.print(f"\n{title}")
        for line in lines:
            console.print(Text(f"  {line}"), soft_wrap=True)
