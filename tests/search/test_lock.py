"""The lock of a directory: for one thread of one process, and for none of its forked children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from functrain.core.errors import RunError
from functrain.search.lock import sole_writer

FORKED = """
import os, sys
from functrain.search.lock import sole_writer
with sole_writer(sys.argv[1]):
    if not (child := os.fork()):
        {child}
    {parent}
    print(child, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(lock: Path, child: str, parent: str = "pass") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock and has forked, and the number of its child; both end with the block."""
    command = [sys.executable, "-c", FORKED.format(child=child, parent=parent), os.fspath(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        try:
            yield process, number
        finally:
            process.kill()


def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "lock", "sys.stdin.read(); os._exit(0)") as (process, child):
        with pytest.raises(RunError, match=f"another process .id {process.pid}."), sole_writer(tmp_path / "lock"):
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        os.kill(child, 0)  # it is alive
        with sole_writer(tmp_path / "lock"):
            os.kill(child, 0)


def test_a_child_that_leaves_the_block_takes_nothing_along(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    left = holder(lock, "sys.exit()", "os.waitpid(child, 0)")
    with left, pytest.raises(RunError, match="in use"), sole_writer(lock):
        pass


def test_a_child_closes_no_file_that_it_has_opened_itself(tmp_path: Path) -> None:
    # The number of the lock file's handle is free in the child, and so the next file has it.
    program = """
import os, sys
from functrain.search.lock import sole_writer
with sole_writer(sys.argv[1]):
    if not (child := os.fork()):
        pass
    else:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    file = os.open(sys.argv[1], os.O_RDONLY)
os.fstat(file)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_within_a_process_too_there_is_one(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "lock"):
        with pytest.raises(RunError, match="in use by this process itself"), sole_writer(tmp_path / "lock"):
            pass
        with pytest.raises(RunError, match="in use by this process itself"), sole_writer(tmp_path / "lock"):
            pass
    with sole_writer(tmp_path / "lock"):
        pass
    with pytest.raises(RunError, match="could not lock"), sole_writer(tmp_path / "missing" / "lock"):
        pass
