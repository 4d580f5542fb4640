"""A run: the directory of what was to be done (config), with what (facts), and how it went (metrics)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from functrain.core.errors import ArgumentError, RunError
from functrain.runs.checkpoints import Checkpoints
from functrain.runs.store import jsonable, read_record, whole_file, with_numbers, write_record
from functrain.search.lock import sole_writer

_KIND = "functrain run"


class Run:
    """The directory of one run; made by `Run.create`, found again by `Run.open`.

    - `config.json`: the resolved config, read back as `run.config`;
    - `run.json`: facts about the run (program, versions, hashes), read back as `run.facts`;
    - `metrics.jsonl`: one JSON object a line, each with its `position`;
    - `checkpoints/`: see `Checkpoints`; `lock`: held while a process trains here.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = Run.create(f"{folder}/first", config={"lr": 0.1}, facts={"torch": "2.13.0"})
    ...     with run.locked():
    ...         run.log({"position": 10, "train/loss": 0.5})
    ...         run.log({"position": 20, "train/loss": float("inf")})
    ...     Run.open(f"{folder}/first").rows()
    [{'position': 10, 'train/loss': 0.5}, {'position': 20, 'train/loss': inf}]
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any], facts: dict[str, Any]) -> None:
        self.path = Path(path)
        self.config = config
        self.facts = facts
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self._log = self.path / "metrics.jsonl"

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        overwrite: bool = False,
    ) -> Run:
        """A new run directory at `path`, which must be missing or empty, or a run that `overwrite` gives up.

        Raises `RunError` for a directory that holds anything else: that one is never touched. A run that
        another process is training in is not overwritten either.
        """
        path = Path(path)
        resolved, known = jsonable(config, "config"), jsonable(facts, "facts")
        try:
            _refuse_foreign(path, overwrite)
            path.mkdir(parents=True, exist_ok=True)
            with sole_writer(path / "lock"):
                _refuse_foreign(path, overwrite)
                _empty(path)
                # First of all, so that what a kill leaves here is known as a run, which can be overwritten.
                write_record(path / "run.json", {"kind": _KIND, "format": 1, "facts": known})
                write_record(path / "config.json", resolved)
                (path / "metrics.jsonl").touch()
                (path / "checkpoints").mkdir()
        except OSError as error:
            raise RunError(f"could not create the run directory {path}: {error}") from error
        return cls(path, resolved, known)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run at `path`; raises `RunError` when there is no directory, or one that is not a run."""
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"no run at {path}: there is no such directory")
        if not (path / "run.json").is_file():
            raise RunError(f"no run at {path}: the directory has no run.json, so functrain did not make it")
        about = read_record(path / "run.json")
        if about.get("kind") != _KIND or not isinstance(about.get("facts"), dict):
            raise RunError(f"no run at {path}: its run.json was not written by functrain, or is damaged")
        return cls(path, read_record(path / "config.json"), about["facts"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for the block: `RunError` when another process (or thread) trains in it.

        The lock is free again when the process ends, however it ends.
        """
        with sole_writer(self.path / "lock"):
            yield

    # --- metrics --------------------------------------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row of metrics, which needs an integer `position`; 0-d tensors become numbers.

        Not-a-number and infinities are written as "nan", "inf" and "-inf", and read back as numbers.
        """
        record = jsonable(row, "row")
        _position(record)
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            handle = os.open(self._log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                _drop_torn_line(handle)
                # One write for a line: a kill leaves a whole line or a torn last one, which reading ignores.
                _write_all(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(f"could not write to {self._log}: {error}") from error

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in order; a last line that a kill has torn is left out.

        Raises `RunError` naming file and line for damage anywhere else.
        """
        return [row for row, _ in self._parsed()]

    def truncate(self, position: int) -> None:
        """Keep only the rows with `row["position"] <= position`, so that what is done over is logged once."""
        kept = [line for row, line in self._parsed() if _position(row) <= position]
        with whole_file(self._log) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))

    def _parsed(self) -> list[tuple[dict[str, Any], bytes]]:
        try:
            lines = self._log.read_bytes().split(b"\n")[:-1] if self._log.exists() else []
        except OSError as error:
            raise RunError(f"could not read {self._log}: {error}") from error
        parsed = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunError(f"{self._log}, line {number} is damaged: {error}") from error
            if not isinstance(row, dict):
                raise RunError(f"{self._log}, line {number} is damaged: expected a JSON object")
            parsed.append((with_numbers(row), line))
        return parsed


def _position(row: Mapping[str, Any]) -> int:
    position = row.get("position")
    if type(position) is not int:
        raise ArgumentError(f"a row of metrics needs an integer 'position', got {position!r} in {dict(row)}")
    return position


def _drop_torn_line(handle: int) -> None:
    end = os.fstat(handle).st_size
    if end == 0 or os.pread(handle, 1, end - 1) == b"\n":
        return
    os.ftruncate(handle, os.pread(handle, end, 0).rfind(b"\n") + 1)


def _write_all(handle: int, line: bytes) -> None:
    while line:
        line = line[os.write(handle, line) :]


# --- making room --------------------------------------------------------------------------------------------


def _contents(path: Path) -> list[Path]:
    # The lock, and what is left of a file that a killed process had begun, are nobody's work.
    return [
        place
        for place in path.iterdir()
        if place.name != "lock" and not (place.name.startswith(".") and place.name.endswith(".tmp"))
    ]


def _refuse_foreign(path: Path, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file: choose another directory for the run (--run)")
    if not _contents(path):
        return
    if not _is_run(path):
        raise RunError(f"{path} is not empty and not a run of functrain: choose another --run")
    if not overwrite:
        raise RunError(
            f"{path} holds a run already: choose another --run, go on with it by `functrain resume {path}`, "
            "or give it up with --overwrite"
        )


def _is_run(path: Path) -> bool:
    try:
        return read_record(path / "run.json").get("kind") == _KIND
    except RunError:
        return False


def _empty(path: Path) -> None:
    """Remove all of a run but its lock and run.json: what a kill leaves can still be overwritten."""
    for place in _contents(path):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif place.name != "run.json":
            place.unlink()
