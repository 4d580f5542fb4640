"""A file that is cut short while its map is read: an error, where the system would end the process."""

import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from functrain.core.errors import DataError
from functrain.data import Budget, h5write, hdf5
from functrain.data.h5 import faults
from functrain.data.h5.faults import GuardedMap
from functrain.data.h5.mapped import Region
from functrain.data.h5.raw import LocalBytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps are guarded on Linux")

PAGES = 64
SIZE = PAGES * mmap.PAGESIZE


def mapped(path):
    path.write_bytes(b"\1" * SIZE)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memory, np.frombuffer(memory, np.uint8)


def ended(code, *arguments):
    """How a program of its own ends: its exit status, and what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    return run.returncode, run.stdout + run.stderr


def test_memory_that_is_gone_reads_as_zeros_and_says_so(tmp_path):
    memory, numbers = mapped(tmp_path / "a")
    mapping = GuardedMap(memory)
    with mapping:
        assert numbers.sum() == SIZE
    assert not mapping.cut
    os.truncate(tmp_path / "a", SIZE // 2)
    with mapping:
        assert numbers.sum() == SIZE // 2
    assert mapping.cut


def test_threads_may_read_the_same_and_other_maps(tmp_path):
    maps = [mapped(tmp_path / name) for name in "ab"]
    mappings = [GuardedMap(memory) for memory, _ in maps]
    os.truncate(tmp_path / "a", 0)
    sums = {}

    def read(thread, which):
        with mappings[which]:
            sums[thread] = int(maps[which][1].sum())

    threads = [threading.Thread(target=read, args=(number, number % 2)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {number: SIZE * (number % 2) for number in range(8)}
    assert [mapping.cut for mapping in mappings] == [True, False]


def test_a_signal_that_a_program_sends_goes_to_whom_it_went(tmp_path):
    met = []
    before = signal.signal(signal.SIGBUS, lambda *_: met.append(True))
    try:
        memory, numbers = mapped(tmp_path / "a")
        mapping = GuardedMap(memory)
        with mapping:
            os.kill(os.getpid(), signal.SIGBUS)
            assert met == [True]
            # And the map is still guarded.
            os.truncate(tmp_path / "a", 0)
            assert numbers.sum() == 0
        assert mapping.cut
    finally:
        signal.signal(signal.SIGBUS, before)


def read_on(source, order, delay):
    """Read until an interrupt comes, after `delay` seconds."""
    signal.setitimer(signal.ITIMER_REAL, delay)
    while True:
        source.take(order, 0)


def test_an_interrupt_during_a_read_ends_the_guard(tmp_path):
    """Along another axis, in one step of NumPy's: the interrupt comes when the read has ended already."""
    h5write(tmp_path / "a.h5", {"x": np.ones((64, 4096), "f8")})
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with hdf5(tmp_path / "a.h5", axis=1) as source:
            order = np.random.default_rng(0).permutation(4096)
            for delay in np.linspace(1e-5, 3e-3, 60):
                with pytest.raises(KeyboardInterrupt):
                    read_on(source, order, delay)
                assert not faults._guard._read
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_the_handler_is_there_only_while_a_map_is_read(tmp_path):
    met = []
    before = signal.signal(signal.SIGBUS, lambda *_: met.append(True))
    try:
        memory, numbers = mapped(tmp_path / "a")
        with GuardedMap(memory), GuardedMap(memory):
            assert numbers[0] == 1
        os.kill(os.getpid(), signal.SIGBUS)
        assert met == [True]
    finally:
        signal.signal(signal.SIGBUS, before)


FOREIGN = """
    import mmap, os, sys
    import numpy as np
    from functrain.data.h5.faults import GuardedMap

    def mapped(path):
        with open(path, "wb") as file:
            file.write(bytes(1 << 16))
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    ours, other = mapped(sys.argv[1]), mapped(sys.argv[2])
    os.truncate(sys.argv[2], 0)
    with GuardedMap(ours):
        print(np.frombuffer(other, np.uint8).sum())
"""


def test_memory_of_others_is_left_to_them(tmp_path):
    """Numbers that are not there must not become zeros for who does not ask whether they are."""
    status, printed = ended(FOREIGN, tmp_path / "a", tmp_path / "b")
    assert (status, printed) == (-signal.SIGBUS, "")


FORKED = """
    import mmap, os, signal, sys
    from functrain.data.h5.faults import GuardedMap

    with open(sys.argv[1], "wb") as file:
        file.write(bytes(1 << 16))
    with open(sys.argv[1], "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with GuardedMap(memory):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGBUS)
            os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_has_what_was_there_before(tmp_path):
    assert ended(FORKED, tmp_path / "a") == (0, f"{signal.SIGBUS.value}\n")


CUT = """
    import os, sys, threading
    import numpy as np
    from functrain.core.errors import DataError
    from functrain.data import hdf5

    path, rows, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    source = hdf5(path)
    order = np.random.default_rng(0).integers(0, rows, 8 * rows)
    assert (source.take(order, 0)["x"] == 1).all()
    reading = threading.Event()

    def cut():
        reading.wait()
        os.truncate(path, end)

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        while True:
            reading.set()
            assert (source.take(order, 0)["x"] == 1).all(), "numbers that are not in the file"
    except DataError as error:
        print(error)
    thread.join()
"""


@pytest.mark.parametrize("left", [0.0, 0.3, 0.7])
def test_cut_short_while_scattered_rows_are_read(tmp_path, left):
    rows = 1 << 12
    h5write(tmp_path / "a.h5", {"x": np.ones((rows, 1024), "f4")})
    end = int((tmp_path / "a.h5").stat().st_size * left)
    status, printed = ended(CUT, tmp_path / "a.h5", rows, end)
    assert status == 0, printed
    assert "a.h5" in printed
    assert "'x'" in printed


def test_a_map_that_was_cut_stays_void(tmp_path):
    """Made whole again, the file holds other bytes than the map, whose lost pages are zeros."""
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.ones((64, 1024), "f4")})
    whole = path.stat().st_size
    file = LocalBytes(str(path))
    region = Region(file, 0, whole, Budget("64 MiB"), "x")
    os.truncate(path, whole // 2)
    with pytest.raises(DataError, match=f"shrank to {whole // 2} bytes"):
        region.gathered(lambda: region.bytes[::-1].copy())
    os.truncate(path, whole)
    with pytest.raises(DataError, match=r"was cut short.* while dataset 'x' was read"):
        region.usable()
    file.close()
