"""Writing to a full disk, or with a Ctrl-C on the way: an error, the old file as it was, and nothing left over."""

import os
import subprocess
import sys

import numpy as np
import pytest

from functrain.core.errors import DataError
from functrain.data import h5concat, h5write, hdf5

# A limit to the size of a file is met at the same place as the end of a disk, by a write that fails.
WRITER = """
import os, resource, sys
from pathlib import Path
import numpy as np
from functrain.core.errors import DataError
from functrain.data import h5concat, h5write

big = np.random.default_rng(0).random((5000, 4))
many = {f"group {n}": {"x": np.arange(n + 1), "y": np.ones((3, n + 1))} for n in range(60)}
ways = {
    "contiguous": lambda path: h5write(path, {"x": big}, overwrite=True),
    "chunked": lambda path: h5write(path, {"x": big}, overwrite=True, chunks=10),
    "gzip": lambda path: h5write(path, {"x": big}, overwrite=True, chunks=100, compression="gzip"),
    "many": lambda path: h5write(path, many, overwrite=True),
    "joined": lambda path: h5concat(path, ["part.h5"] * 20, overwrite=True),
    "joined chunks": lambda path: h5concat(path, ["chunked.h5"] * 20, overwrite=True),
    "batches": lambda path: h5write(path, (big[n : n + 70] for n in range(0, 5000, 70)), group="x", overwrite=True),
}
os.chdir(sys.argv[1])
h5write("part.h5", {"x": np.ones((100, 8))})
h5write("chunked.h5", {"x": big[:100]}, chunks=5, compression="lzf")
write = ways[sys.argv[2]]
write("whole.h5")
size = os.path.getsize("whole.h5")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in [0, 1, 100, *range(500, size, max(1, size // 10)), size - 1, size]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write("old.h5")
        assert limit >= size, f"a file of {size} bytes was written within {limit}"
    except DataError as error:
        assert limit < size, error
        assert "'old.h5' could not be written: " in str(error), error
        assert Path("old.h5").read_text() == "old"
    assert sorted(os.listdir()) == ["chunked.h5", "old.h5", "part.h5", "whole.h5"]
"""


@pytest.mark.parametrize("way", ["contiguous", "chunked", "gzip", "many", "joined", "joined chunks", "batches"])
def test_a_full_disk_is_an_error_and_no_crash(tmp_path, way):
    (tmp_path / "old.h5").write_text("old")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path), way], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "old.h5").read_bytes()[1:4] == b"HDF"


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.zeros(3)})
    with pytest.raises(DataError, match=r"'/proc/x\.h5' could not be written"):
        h5write("/proc/x.h5", {"x": np.zeros(4)})
    with pytest.raises(DataError, match=r"'/proc/x\.h5' could not be written"):
        h5concat("/proc/x.h5", [tmp_path / "a.h5"])
    with pytest.raises(DataError, match="null character"):
        h5write(str(tmp_path / "a\0b.h5"), {"x": np.zeros(4)})


# An alarm whose handler raises comes at any moment, as Ctrl-C does, and at a time that can be set.
INTERRUPTED = """
import os, signal, sys, time
import numpy as np
from functrain.data import h5write

def raised(number, frame):
    raise KeyboardInterrupt

os.chdir(sys.argv[1])
big = np.random.default_rng(0).random((6000, 64))
write = lambda: h5write("old.h5", {"x": big, "y": big[:9]}, overwrite=True, chunks=50, compression="gzip")
signal.signal(signal.SIGALRM, raised)
started = time.perf_counter()
write()
took = time.perf_counter() - started
interrupted = 0
for part in range(20):
    signal.setitimer(signal.ITIMER_REAL, took * (part + 0.5) / 20)
    try:
        write()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    assert signal.getsignal(signal.SIGALRM) is raised
    assert os.listdir() == ["old.h5"]
assert interrupted > 5, interrupted
"""


# The batches come from code of the caller's, which a signal reaches while it waits.
WAITING = """
import os, signal, sys, threading
import numpy as np
from functrain.data import h5write

def batches():
    yield np.ones((5, 2))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    threading.Event().wait(60)
    print("never came")

def raised(number, frame):
    raise KeyboardInterrupt

os.chdir(sys.argv[1])
signal.signal(signal.SIGALRM, raised)
try:
    h5write("a.h5", batches(), group="x")
except KeyboardInterrupt:
    print("interrupted", os.listdir(), signal.getsignal(signal.SIGALRM) is raised)
"""


def test_an_interrupt_while_waiting_for_a_batch_comes_through(tmp_path):
    done = subprocess.run([sys.executable, "-c", WAITING, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout == "interrupted [] True\n"


def test_an_interrupt_while_writing_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    with hdf5(tmp_path / "old.h5", "x") as source:
        assert len(source) == 6000
    assert os.listdir(tmp_path) == ["old.h5"]
