"""Bench `start`: importing functrain against importing torch."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from bench.race import Result, compare, race


def _import(name: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True)


def run() -> list[Result]:
    """Race fresh interpreters."""
    times = race({"functrain": partial(_import, "functrain"), "import torch": partial(_import, "torch")}, rounds=9)
    return compare("start", "import functrain", times, "functrain", {"import torch": 1.10})
