"""Files and sources change while they are read: that is an error or the right numbers, never a crash or a hang."""

import gc
import json
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest

import functrain as ft
from functrain.core.errors import DataError
from functrain.data import h5write, hdf5

ROWS = 400
X = np.arange(ROWS * 600.0).reshape(ROWS, 600)
# By way and filter: how each is created.
LAYOUTS = {
    "mapped": {},
    "mapped chunks": {"chunks": (32, 600)},
    "plain direct": {"chunks": (32, 200)},
    "gzip": {"chunks": (32, 600), "compression": "gzip", "shuffle": True},
    "checksum": {"chunks": (32, 600), "fletcher32": True},
    "lzf": {"chunks": (32, 600), "compression": "lzf"},
    "scaleoffset": {"chunks": (32, 600), "scaleoffset": 0},
}


def write(path, array=X, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array, **options)


def shelf(path, layout, array=X):
    write(path, array.astype("i8") if layout == "scaleoffset" else array, **LAYOUTS[layout])


def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("functrain")]


# --- the file changes under a reader ---------------------------------------------------------------------------------

READER = """
import json, sys
import numpy as np
from functrain.core.errors import DataError
from functrain.data import hdf5

sources = {}
for line in sys.stdin:
    what, name, path = json.loads(line)
    try:
        if what == "open":
            sources[name] = hdf5(path, "x", threads=2)
            answer = float(sources[name](0)[1])
        else:
            rows = sources[name].take(np.arange(len(sources[name]))[::-1].copy(), 0)
            answer = bool((rows.numpy() == np.arange(rows.numel()).reshape(rows.shape)[::-1]).all())
    except DataError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class Reader:
    """A process that reads, so that a crash of it is seen."""

    def __init__(self):
        command = [sys.executable, "-W", "error", "-c", READER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, what, name, path):
        print(json.dumps([what, name, str(path)]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, f"the reader of {name} died: exit {self.process.wait()}"
        return json.loads(answer)


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    reader.process.communicate()
    assert reader.process.returncode == 0


def cut(path):
    os.truncate(path, 5000)


def emptied(path):
    os.truncate(path, 0)


def shortened(path):
    os.truncate(path, path.stat().st_size - 1)


def zeroed(path):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(9000)
        file.write(bytes(size - 9000))


def deleted(path):
    path.unlink()


def replaced(path):
    h5write(path, {"x": np.zeros((3, 3))}, overwrite=True)


def overwritten(path):
    other = path.with_suffix(".other")
    h5write(other, {"padding": np.ones(7), "x": np.full((ROWS, 600), 7.0)})
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("change", [cut, emptied, shortened, zeroed, deleted, replaced, overwritten])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_changes_while_it_is_open(tmp_path, reader, layout, change):
    path = tmp_path / "a.h5"
    shelf(path, layout)
    name = f"{layout}, {change.__name__}"
    assert reader("open", name, path) == 1.0
    change(path)
    answer = reader("read", name, path)
    if change in (deleted, replaced):
        assert answer is True
    elif change in (cut, emptied, shortened) or layout == "gzip":
        # The last chunk may not reach to the file's end.
        assert "a.h5" in str(answer) or (change is shortened and answer is True)
    else:
        # Nothing can tell other numbers from those that were meant; zeros have the checksum zero.
        assert "a.h5" in str(answer) or answer is False


def test_a_chunk_that_fails_to_decode_is_named_from_every_thread(tmp_path):
    path = tmp_path / "a.h5"
    shelf(path, "gzip")
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info_by_coord((96, 0))
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset + chunk.size // 2)
        file.write(b"damaged")
    message = rf"dataset 'x' in '{path}' is damaged: chunk \(3, 0\), {chunk.size} bytes from byte {chunk.byte_offset}, "
    for threads in (1, 3):
        with hdf5(path, "x", threads=threads) as source:
            for read in (lambda: source(100), lambda: source.batch(64)(1), lambda: list(source.batch(400))):
                with pytest.raises(DataError, match=message):
                    read()
            assert source(90)[0] == X[90, 0]
            with pytest.raises(DataError, match=message), ft.prefetch(source.batch(50), 2) as batches:
                list(batches)
            assert source(200)[0] == X[200, 0]


# --- links and shapes that lead nowhere ------------------------------------------------------------------------------


def test_circles_of_links_end(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["soft"] = h5py.SoftLink("/other")
        file["other"] = h5py.SoftLink("/soft")
        file["out"] = h5py.ExternalLink("b.h5", "/back")
        file["self"] = h5py.ExternalLink("a.h5", "/self")
        file["group/x"] = np.arange(3)
        file["group/up"] = file["/"]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["back"] = h5py.ExternalLink("a.h5", "/out")
    for name in ("soft", "out", "self"):
        for arguments in ({"group": name}, {"datasets": [name]}):
            with pytest.raises(DataError, match=rf"a\.h5.*{name}|{name}.*a\.h5"):
                hdf5(tmp_path / "a.h5", **arguments)
    with hdf5(tmp_path / "a.h5", "group/up/group/up/group", datasets=["x"]) as source:
        assert int(source(2)["x"]) == 2
    with pytest.raises(DataError, match=r"holds no datasets|cannot be opened|circle"):
        hdf5(tmp_path / "a.h5")


# --- many readers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_threads_read_one_source(tmp_path, layout):
    path = tmp_path / "a.h5"
    shelf(path, layout)
    wrong = queue.SimpleQueue()
    # Room for two chunks, so that they come and go.
    with hdf5(path, "x", threads=2, memory=400_000) as source:

        def read(seed):
            for indices in np.random.default_rng(seed).integers(0, ROWS, (12, 25)):
                if not np.array_equal(source.take(indices, 0).numpy(), X[indices]):
                    wrong.put(indices)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong.empty()
    assert own_threads() == []


def read_in_child(source, answers):
    rows = source.take(np.arange(ROWS)[::-7].copy(), 0).numpy()
    answers.put(bool(np.array_equal(rows, X[::-7])))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("layout", ["mapped", "plain direct", "gzip", "scaleoffset"])
def test_processes_forked_amid_reading_threads_read_too(tmp_path, layout):
    path = tmp_path / "a.h5"
    shelf(path, layout)
    context = multiprocessing.get_context("fork")
    answers, stop = context.SimpleQueue(), threading.Event()
    with hdf5(path, "x", threads=2, memory=400_000) as source:

        def read():
            while not stop.is_set():
                source.take(np.arange(0, ROWS, 9), 0)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        children = [context.Process(target=read_in_child, args=(source, answers)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        stop.set()
        for thread in threads:
            thread.join()
        hanging = [child for child in children if child.exitcode is None]
        for child in hanging:
            child.kill()
        assert [child.exitcode for child in children] == [0] * 4
        assert all(answers.get() for _ in children)
        assert np.array_equal(source.take(np.arange(ROWS), 0).numpy(), X)


def test_processes_spawned_with_a_source_read_too(tmp_path):
    shelf(tmp_path / "a.h5", "gzip")
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with hdf5(tmp_path / "a.h5", "x", threads=2) as source:
        source(3)
        children = [context.Process(target=read_in_child, args=(source, answers)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        assert [answers.get(), answers.get()] == [True, True]


# --- letting go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closing_while_others_read(tmp_path, layout):
    """What they get is right, or says that the source was closed; never rows of the file that was opened next."""
    path, other = tmp_path / "a.h5", tmp_path / "b.h5"
    shelf(path, layout)
    shelf(other, layout, -X)
    problems = queue.SimpleQueue()

    def read(source, started):
        try:
            for n in range(1000):
                indices = np.arange(n % 7, ROWS, 13)
                rows = source.take(indices, 0).numpy()
                started.set()
                if not np.array_equal(rows, X[indices]):
                    problems.put(f"wrong rows: {rows[:, 1]}")
        except DataError as error:
            if "was closed" not in str(error):
                problems.put(error)
        except BaseException as error:
            problems.put(error)
        finally:
            started.set()

    for _ in range(4):
        source = hdf5(path, "x", threads=2, memory=1)
        started = [threading.Event() for _ in range(3)]
        threads = [threading.Thread(target=read, args=(source, event)) for event in started]
        for thread in threads:
            thread.start()
        for event in started:
            event.wait()
        source.close()
        with hdf5(other, "x", threads=2, memory=1) as after:
            assert np.array_equal(after.take(np.arange(0, ROWS, 5), 0).numpy(), -X[::5])
        for thread in threads:
            thread.join()
    assert problems.empty(), problems.get()
    assert own_threads() == []


def test_nothing_is_left_of_sources_closed_or_forgotten(tmp_path):
    layouts = [*LAYOUTS]
    for layout in layouts:
        shelf(tmp_path / f"{layout}.h5", layout, X[:40])
        hdf5(tmp_path / f"{layout}.h5", "x", threads=2).close()
    before = descriptors()
    for n in range(300):
        source = hdf5(tmp_path / f"{layouts[n % len(layouts)]}.h5", "x", threads=1 + n % 4 // 2).batch(7)
        if n % 2:
            source(3)
        if n % 3:
            source.inner[0].close()
    del source
    assert descriptors() == before
    assert own_threads() == []


def test_nothing_is_left_of_sources_that_could_not_be_made(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["none"] = np.zeros((9, 2)), np.zeros(8), np.zeros((0, 2))
        file["words"] = ["text"]
        file.create_dataset("z", data=np.zeros(9), chunks=(4,), compression="gzip")
    before = descriptors()
    cases = {
        "differ in length": {"datasets": ["x", "y"]},
        "no samples": {"group": "none"},
        "string": {"datasets": ["z", "words"]},
        "has no": {"datasets": ["z", "gone"]},
        "axis": {"datasets": ["z", "x"], "axis": 1},
    }
    for message, arguments in cases.items():
        for _ in range(10):
            with pytest.raises(ft.FunctrainError, match=message):
                hdf5(path, threads=2, **arguments)
    assert descriptors() == before
    assert own_threads() == []


def test_a_forgotten_source_ends_its_threads_and_closes_its_file(tmp_path):
    path = tmp_path / "a.h5"
    shelf(path, "gzip")
    before = descriptors()
    source = hdf5(path, "x", threads=3)
    list(source.batch(100))
    assert len(own_threads()) > 0
    assert descriptors() > before
    del source
    assert descriptors() == before
    for thread in threading.enumerate():
        if thread.name.startswith("functrain"):
            thread.join(30)
    assert own_threads() == []
    with h5py.File(path, "r+") as file:
        file["x"][0] = 1.0
    assert re.search("gzip", str(hdf5(path, "x").explain()))
