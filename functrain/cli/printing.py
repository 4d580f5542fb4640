"""Printing to where it may not be possible: a full disk, a pipe whose reader has gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from functrain.core.errors import FunctrainError


@contextmanager
def printing() -> Iterator[None]:
    """What is printed in the block is written when it ends; `FunctrainError` where that cannot be."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence()
        raise FunctrainError(f"the output cannot be written: {error}") from error


def silence() -> None:
    """What is printed from here on, and what is still to be written, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
