"""The journal of a search: one JSON line for each finished trial, safe against a death at any moment."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from functrain.core.errors import RunError
from functrain.search.lock import sole_writer

Record = dict[str, Any]


class Journal:
    """The file `journal.jsonl` of a directory, read at the start of a `with` block and appended to within it.

    A line is on the disk itself (fsync) when `append` returns. A last line that is not whole, because its
    writer died, is cut off. Records are dicts with a `key`; where one has several lines, the last counts.

    One writer at a time: raises `RunError` when another process or thread has the journal open, and for a damaged line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Journal(folder) as journal:
    ...         journal.append({"key": "a", "score": 0.5})
    ...     with Journal(folder) as journal:
    ...         print(journal.records)
    {'a': {'key': 'a', 'score': 0.5}}
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "journal.jsonl"
        self.records: dict[str, Record] = {}
        self._file = -1
        self._open = ExitStack()

    def __enter__(self) -> Journal:
        try:
            with ExitStack() as stack:
                self.directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(sole_writer(self.directory / ".lock"))
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                stack.callback(os.close, self._file)
                self._read()
                self._open = stack.pop_all()
        except OSError as error:
            raise RunError(f"could not open the journal {self.path}: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file = -1
        self._open.close()

    def append(self, record: Record) -> None:
        """Write one record, and have it on the disk; raises `RunError` when that fails."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except BaseException as error:
            # Of a full disk, or an interrupt, there may be half a line, to which the next record must not be joined.
            with suppress(OSError):
                os.ftruncate(self._file, end)
            if isinstance(error, OSError):
                raise RunError(f"could not write to the journal {self.path}: {error}") from error
            raise
        self.records[record["key"]] = record

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(self._file, whole)
        for number, line in enumerate(text[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    f"line {number} of {self.path} is damaged ({error}): remove it, and its trial runs again"
                ) from error
