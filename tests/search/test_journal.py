"""The journal, as it is left behind by searches that end well and by those that do not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from functrain.core.errors import RunError
from functrain.search.journal import Journal

RECORDS: list[dict[str, Any]] = [{"key": "a", "score": 1.0}, {"key": "b", "score": "nan"}, {"key": "é", "error": "two\nlines"}]


def filled(folder: Path) -> Path:
    with Journal(folder) as journal:
        for record in RECORDS:
            journal.append(record)
    return folder / "journal.jsonl"


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "deep" / "search")
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS
    with Journal(path.parent) as journal:
        assert list(journal.records.values()) == RECORDS
        journal.append({"key": "a", "score": 2.0})
    with Journal(path.parent) as journal:
        assert journal.records["a"] == {"key": "a", "score": 2.0}
        assert len(journal.records) == 3


def test_every_length_of_a_half_written_last_line_is_tolerated(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        with Journal(tmp_path) as journal:
            assert list(journal.records) == ["a", "b"]
            journal.append(RECORDS[2])
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"{]\n", b"3\n", b"{}\n", b"\xff\n"):
        path.write_bytes(lines[0] + damage + lines[2])
        with pytest.raises(RunError, match=r"line 2 of .*journal\.jsonl is damaged"), Journal(tmp_path):
            pass


def test_a_directory_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not open the journal"), Journal(tmp_path / "file"):
        pass


def test_one_thread_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path) as first:
        with ThreadPoolExecutor(1) as pool, pytest.raises(RunError, match="in use by this process itself"):
            pool.submit(Journal(tmp_path).__enter__).result()
        with pytest.raises(RunError, match="in use"), Journal(tmp_path):
            pass
        first.append(RECORDS[0])
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        other = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "RunError" in other.stderr


def test_a_write_that_fails_leaves_whole_lines(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from functrain.core.errors import RunError
from functrain.search.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(sys.argv[1]) as journal:
    journal.append({"key": "a"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        journal.append({"key": "b", "error": "x" * 200})
    except RunError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append({"key": "c"})
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "could not write to the journal" in done.stdout
    with Journal(tmp_path) as journal:
        assert list(journal.records) == ["a", "c"]


HOLDER = """
import sys
from functrain.search.journal import Journal
with Journal(sys.argv[1]) as journal:
    journal.append({"key": "a"})
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_until_it_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by another process .id {holder.pid}."), Journal(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with Journal(tmp_path) as journal:
        assert list(journal.records) == ["a"]
