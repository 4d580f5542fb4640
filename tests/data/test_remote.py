"""Files behind URLs: the same numbers as here, from servers that fail too, within the bytes that were allowed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.core.errors import ArgumentError, DataError, MissingExtraError
from functrain.data.h5.block_cache import BLOCK, FolderBlocks, MemoryBlocks
from functrain.data.h5.files import found, opened
from functrain.data.h5.raw import open_bytes
from functrain.data.h5.remote import RemoteBytes
from functrain.data.laws import check_prefetch, check_source

CONTENT = np.random.default_rng(0).bytes(3 * BLOCK + 12345)


class Server:
    """A web server on this machine, and what is wrong with it."""

    def __init__(self) -> None:
        self.content, self.tag = CONTENT, '"first"'
        self.requests: list[tuple[int, int]] = []
        self.before: Callable[[int], str] = lambda number: ""
        self.ranges, self.says_size, self.tags, self.guards = True, True, True, True
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._httpd.server_port}/a.h5"

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                trouble = server.before(len(server.requests)) if body else ""
                start, stop = 0, len(server.content)
                if body:
                    wanted = self.headers.get("Range")
                    if wanted and server.ranges:
                        first, last = wanted.removeprefix("bytes=").split("-")
                        start, stop = int(first), min(int(last) + 1, stop)
                    server.requests.append((start, stop))
                if trouble.isdigit():
                    self.send_error(int(trouble))
                    return
                if server.tags and server.guards and self.headers.get("If-Match", server.tag) != server.tag:
                    self.send_error(412)
                    return
                self.send_response(206 if (start, stop) != (0, len(server.content)) else 200)
                if server.says_size:
                    self.send_header("Content-Length", str(stop - start))
                if server.tags:
                    self.send_header("ETag", server.tag)
                if server.ranges and (start, stop) != (0, len(server.content)):
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(server.content)}")
                self.end_headers()
                if body:
                    piece = server.content[start:stop]
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        self.wfile.write(piece[: len(piece) // 2] if trouble == "cut" else piece)

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of `CONTENT` in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.pipe("/content", CONTENT)
    yield "memory://content"
    system.rm("/content")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "a.h5"
    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["plain"] = draw.standard_normal((1000, 7))
        file.create_dataset("group/packed", data=draw.integers(0, 99, (5000, 50)), chunks=(100, 50), compression="gzip")
        file.create_dataset("raw", data=np.arange(300_000), chunks=(10_000,))
        file["soft"] = h5py.SoftLink("/plain")
        file["out"] = h5py.ExternalLink("b.h5", "/plain")
        layout = h5py.VirtualLayout((1000, 7), "f8")
        layout[:] = h5py.VirtualSource("b.h5", "plain", (1000, 7))
        file.create_virtual_dataset("virtual", layout)
    return path


# --- bytes ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 2 * BLOCK)), min_size=1, max_size=8))
def test_any_bytes_are_those_of_the_file(places: list[tuple[int, int]]) -> None:
    fsspec.filesystem("memory").pipe("/drawn", CONTENT)
    file = RemoteBytes("memory://drawn", {"cache_bytes": "2 MiB"})
    for offset, size in places:
        size = min(size, len(CONTENT) - offset)
        assert file.read(offset, size) == CONTENT[offset : offset + size]
    file.close()


def test_bytes_past_the_end_are_an_error(memory: str) -> None:
    file = open_bytes(memory)
    assert file.size() == len(CONTENT)
    for offset, size in ((len(CONTENT), 1), (0, len(CONTENT) + 1), (-1, 1)):
        with pytest.raises(DataError, match="'memory://content' ends at"):
            file.read(offset, size)
    file.close()
    with pytest.raises(DataError, match="was closed"):
        file.read(0, 1)


def test_neighbouring_blocks_come_at_once_and_kept_ones_not_again(server: Server) -> None:
    file = RemoteBytes(server.url)
    server.requests.clear()
    assert file.read(5, 3 * BLOCK) == CONTENT[5 : 5 + 3 * BLOCK]
    assert server.requests == [(0, len(CONTENT))]
    assert file.read(BLOCK, BLOCK + 1) == CONTENT[BLOCK : 2 * BLOCK + 1]
    assert len(server.requests) == 1
    file.close()


def test_memory_holds_no_more_than_it_may(server: Server) -> None:
    file = RemoteBytes(server.url, {"cache_bytes": 2 * BLOCK})
    server.requests.clear()
    for start in (0, 1, 0, 2, 1, 0):
        file.read(start * BLOCK, 10)
    # 0 was used after 1 was, so 2 drove out 1, which drove out 0 (2 had come later).
    assert [start // BLOCK for start, _ in server.requests] == [0, 1, 2, 1, 0]
    file.close()


def test_many_threads_fetch_a_block_once(server: Server) -> None:
    file = RemoteBytes(server.url)
    server.requests.clear()
    gate = threading.Barrier(8)

    def read(place: int) -> bytes:
        gate.wait(30)
        return file.read(place * 1000, 1000)

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(read, range(8))) == CONTENT[:8000]
    assert server.requests == [(0, BLOCK)]
    file.close()


# --- servers that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["500", "503", "429", "cut"])
def test_a_server_that_fails_now_and_then_is_asked_again(server: Server, trouble: str) -> None:
    server.before = lambda number: trouble if number % 3 == 1 else ""
    file = RemoteBytes(server.url)
    for start in range(0, len(CONTENT), BLOCK):
        assert file.read(start, min(BLOCK, len(CONTENT) - start)) == CONTENT[start : start + BLOCK]
    file.close()


@pytest.mark.parametrize("trouble", ["500", "cut", "403"])
def test_a_server_that_fails_for_good_is_told_with_url_and_offset(server: Server, trouble: str) -> None:
    file = RemoteBytes(server.url)
    server.before = lambda number: trouble
    server.requests.clear()
    with pytest.raises(DataError, match=rf"'{server.url}' cannot be read at byte {BLOCK} \(attempt [15]\)"):
        file.read(BLOCK + 7, 10)
    assert len(server.requests) == (1 if trouble == "403" else 5)
    server.before = lambda number: ""
    assert file.read(BLOCK + 7, 10) == CONTENT[BLOCK + 7 : BLOCK + 17]
    file.close()


def test_a_server_that_ignores_ranges_is_told_before_anything_is_fetched(server: Server) -> None:
    server.ranges = False
    with pytest.raises(DataError, match="does not serve parts of files"):
        RemoteBytes(server.url)


def test_a_server_that_stops_serving_ranges_gives_no_wrong_numbers(server: Server) -> None:
    file = RemoteBytes(server.url)
    server.ranges = False
    with pytest.raises(DataError, match="does not serve parts of files"):
        file.read(BLOCK, 10)
    file.close()


def test_what_is_not_there_is_told(server: Server) -> None:
    server.says_size = False
    with pytest.raises(DataError, match="does not say how long"):
        RemoteBytes(server.url)
    url = server.url
    server.close()
    for absent in ("memory://nothing", url):
        with pytest.raises(DataError, match=f"'{absent}' cannot be found"):
            RemoteBytes(absent)
    fsspec.filesystem("memory").pipe("/folder/a", b"a")
    with pytest.raises(DataError, match="is a directory"):
        RemoteBytes("memory://folder")


def test_wrong_options_are_told(memory: str) -> None:
    cases = {"cache": 3, "cache_bytes": 0}
    for name, value in cases.items():
        with pytest.raises(ArgumentError, match=name):
            RemoteBytes(memory, {name: value})
    with pytest.raises(ArgumentError, match="nosuch"):
        RemoteBytes("nosuch://a.h5")
    with pytest.raises(MissingExtraError, match="gs://bucket"):
        RemoteBytes("gs://bucket/a.h5")


@pytest.mark.parametrize(("tags", "guards"), [(True, True), (True, False), (False, False)])
def test_a_file_that_is_replaced_is_not_mixed_with_the_one_before(server: Server, tags: bool, guards: bool) -> None:
    server.tags, server.guards = tags, guards
    file = RemoteBytes(server.url)
    file.read(0, 10)
    server.content, server.tag = CONTENT[::-1] + b"x", '"second"'
    with pytest.raises(DataError, match="replaced by another version"):
        file.read(BLOCK, 10)
    file.close()
    again = RemoteBytes(server.url)
    assert again.read(BLOCK, 10) == server.content[BLOCK : BLOCK + 10]
    again.close()


# --- the cache in a folder -----------------------------------------------------------------------------------


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != "")


def test_a_folder_outlives_the_file_and_keeps_versions_apart(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        file = RemoteBytes(server.url, {"cache": tmp_path})
        assert file.read(0, len(CONTENT)) == CONTENT
        file.close()
    assert [size for size in server.requests if size[1] - size[0] > 1] == [(0, len(CONTENT))]
    # The same length, another tag.
    server.content, server.tag = CONTENT[::-1], '"second"'
    file = RemoteBytes(server.url, {"cache": tmp_path})
    assert file.read(0, len(CONTENT)) == CONTENT[::-1]
    file.close()


def test_a_folder_holds_no_more_than_it_may(memory: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not a block")
    for limit in (3 * BLOCK, 2 * BLOCK, BLOCK):
        file = RemoteBytes(memory, {"cache": tmp_path, "cache_bytes": limit})
        for offset in (0, 2 * BLOCK, BLOCK, 3 * BLOCK, 0, BLOCK):
            assert file.read(offset, 100) == CONTENT[offset : offset + 100]
            assert held(tmp_path) <= limit + len("not a block")
        file.close()
    assert (tmp_path / "mine.txt").read_text() == "not a block"


def test_damaged_blocks_are_fetched_again(memory: str, tmp_path: Path) -> None:
    file = RemoteBytes(memory, {"cache": tmp_path})
    file.read(0, len(CONTENT))
    blocks = sorted(tmp_path.glob("*.block"))
    assert len(blocks) == 4
    whole = blocks[0].read_bytes()
    blocks[0].write_bytes(whole[:-9])
    blocks[1].write_bytes(bytes([whole[0] ^ 1, *whole[1:]]))
    blocks[2].write_bytes(b"")
    blocks[3].unlink()
    file.close()
    again = RemoteBytes(memory, {"cache": tmp_path})
    assert again.read(0, len(CONTENT)) == CONTENT
    again.close()
    assert blocks[0].read_bytes() == whole


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "old-0.aa.part").write_bytes(bytes(5000))
    os.utime(tmp_path / "old-0.aa.part", (0, 0))
    blocks = FolderBlocks(str(tmp_path), "key", 10_000)
    for number in range(8):
        blocks.put(number, bytes([number]) * 1500)
    assert not list(tmp_path.glob("*.part"))
    again = FolderBlocks(str(tmp_path), "key", 10_000)
    assert again.get(7, 1500) == bytes([7]) * 1500
    assert again.get(0, 1500) is None


def test_a_folder_that_cannot_be_written_to_is_told(memory: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the cache folder .* cannot be written to"):
        RemoteBytes(memory, {"cache": tmp_path / "file"})


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40), st.integers(10, 60))
def test_blocks_in_memory_are_the_last_ones_used(steps: list[tuple[int, bool]], limit: int) -> None:
    blocks, model = MemoryBlocks(limit), {}
    for number, put in steps:
        data = bytes([number]) * (number + 5)
        if put:
            model.pop(number, None)
            model[number] = data
            blocks.put(number, data)
            while sum(map(len, model.values())) > limit:
                del model[next(iter(model))]
        else:
            assert blocks.get(number, len(data)) == model.get(number)
            if number in model:
                model[number] = model.pop(number)


def _fill(url: str, folder: str, seed: int) -> None:
    file = RemoteBytes(url, {"cache": folder, "cache_bytes": 2 * BLOCK + 100})
    draw = np.random.default_rng(seed)
    for _ in range(20):
        offset = int(draw.integers(0, len(CONTENT) - 1000))
        assert file.read(offset, 1000) == CONTENT[offset : offset + 1000]
    file.close()


def test_processes_share_a_folder(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(server.url, str(tmp_path), seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert held(tmp_path) <= 2 * BLOCK + 100
    assert not list(tmp_path.glob("*.part"))


# --- HDF5 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["memory", "http"])
def test_h5py_reads_the_same_numbers_from_afar(server: Server, shelf: Path, way: str) -> None:
    server.content = shelf.read_bytes()
    fsspec.filesystem("memory").pipe("/a.h5", server.content)
    server.before = lambda number: "503" if number % 4 == 2 else ""
    url = {"memory": "memory://a.h5", "http": server.url}[way]
    with opened(url) as file, h5py.File(shelf) as here:
        assert file.filename == url
        for name in ("plain", "group/packed", "raw", "soft"):
            assert np.array_equal(found(file, url, name)[()], here[name][()]), name
        for name in ("out", "virtual"):
            with pytest.raises(DataError, match=r"another file, 'b.h5', which cannot be followed from a remote file"):
                found(file, url, name)
        with pytest.raises(DataError, match=f"'{url}' has no 'absent'"):
            found(file, url, "absent")


# Objects of h5py in reference cycles, which whatever thread collects garbage must wait for HDF5's lock to be rid of.
CYCLES = """
import faulthandler, gc, sys
from functrain.data.h5.files import opened

faulthandler.dump_traceback_later(40, exit=True)
gc.set_threshold(7, 1, 1)
for _ in range(10):
    with opened(sys.argv[1], storage={"cache_bytes": 1}) as file:
        for name in ("plain", "raw", "group/packed"):
            cycle = [file[name]]
            cycle.append(cycle)
            cycle[0][:50]
"""


def test_garbage_of_h5py_does_not_stop_the_thread_that_fetches(server: Server, shelf: Path) -> None:
    server.content = shelf.read_bytes()
    done = subprocess.run([sys.executable, "-c", CYCLES, server.url], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_no_hdf5_file_is_told(memory: str) -> None:
    with pytest.raises(DataError, match="'memory://content' is not an HDF5 file"), opened(memory):
        pass
    fsspec.filesystem("memory").pipe("/empty", b"")
    with pytest.raises(DataError, match="'memory://empty' is empty"), opened("memory://empty"):
        pass


def test_a_server_that_dies_while_h5py_reads_is_told(server: Server, shelf: Path) -> None:
    server.content = shelf.read_bytes()
    with opened(server.url, storage={"cache_bytes": 1}) as file:
        dataset = found(file, server.url, "raw")
        server.before = lambda number: "404"
        with pytest.raises(DataError, match=f"'{server.url}' cannot be read at byte"):
            dataset[()]
        server.before = lambda number: ""
        assert dataset[299_999] == 299_999


def _sum(file: RemoteBytes, answer: object) -> None:
    answer.put(sum(file.read(BLOCK, 5000)))


def test_a_forked_process_reads_on(server: Server) -> None:
    file = RemoteBytes(server.url)
    file.read(0, 10)
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    worker = context.Process(target=_sum, args=(file, answer))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert answer.get() == sum(CONTENT[BLOCK : BLOCK + 5000])
    assert file.read(2 * BLOCK, 10) == CONTENT[2 * BLOCK : 2 * BLOCK + 10]
    file.close()


def test_closing_ends_the_attempts_of_other_threads(server: Server) -> None:
    file = RemoteBytes(server.url)
    failed = threading.Event()

    def trouble(number: int) -> str:
        failed.set()
        return "500"

    server.before = trouble
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.read, 0, 10)
        assert failed.wait(30)
        file.close()
        with pytest.raises(DataError, match=r"was closed|attempt"):
            reading.result(30)


# --- sources -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_a_remote_source_is_the_local_one(server: Server, shelf: Path, tmp_path: Path, threads: int) -> None:
    server.content = shelf.read_bytes()
    server.before = lambda number: "cut" if number % 20 == 1 else ""
    order = np.random.default_rng(1).permutation(1000)
    storage = {"cache": tmp_path / "cache", "cache_bytes": "2 MiB"}
    for name, way in (("plain", "h5py"), ("raw", "direct"), ("group/packed", "direct")):
        with ft.hdf5(server.url, name, threads=threads, storage=storage) as source, ft.hdf5(shelf, name) as here:
            assert f"{way}: " in str(source.explain())
            assert np.array_equal(source.take(order, 0).numpy(), here.take(order, 0).numpy())
            check_source(source.batch(len(source) // 7))
            if name == "group/packed":
                check_prefetch(source.batch(700))


def _first(source: ft.Source, answer: object) -> None:
    answer.put(source.take(np.arange(1000), 0).sum().item())


def test_a_remote_source_survives_a_fork(server: Server, shelf: Path) -> None:
    server.content = shelf.read_bytes()
    context = multiprocessing.get_context("fork")
    for name in ("plain", "group/packed"):
        with ft.hdf5(server.url, name) as source:
            total = source.take(np.arange(1000), 0).sum().item()
            answer = context.SimpleQueue()
            worker = context.Process(target=_first, args=(source, answer))
            worker.start()
            worker.join(60)
            assert worker.exitcode == 0
            assert answer.get() == total


def test_a_remote_file_is_inspected_and_hashed(server: Server, shelf: Path) -> None:
    server.content = shelf.read_bytes()
    report = ft.h5inspect(server.url)
    hashes = {name: ft.content_hash(shelf, name) for name in ("plain", "raw", "group/packed", "soft")}
    assert {each.name: each.hash for each in report.datasets} == hashes
    assert [name for name, _ in report.broken] == ["out", "virtual"]
