"""Readers of chunked datasets: the same rows as h5py's, whatever the budget, the threads, the axis and the order."""

import gc
import os
import threading

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.core.errors import DataError
from functrain.data.budget import Account, Budget
from functrain.data.h5.chunked import Direct
from functrain.data.h5.files import opened
from functrain.data.h5.layout import layout_of
from functrain.data.h5.readers import Readers
from functrain.data.h5.source import hdf5

SHAPE = (37, 5, 6)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("chunked") / "a.h5")
    generator = np.random.default_rng(0)
    data = generator.integers(0, 50, SHAPE).astype("i4")
    with h5py.File(path, "w") as file:
        for name, chunks in {"rows": (4, 5, 6), "pieces": (4, 2, 4), "one": (1, 1, 1), "all": (64, 5, 6)}.items():
            maxshape = (64, None, None)
            file.create_dataset(name, data=data, chunks=chunks, maxshape=maxshape, compression="gzip", shuffle=True)
            file.create_dataset(name + " plain", data=data, chunks=chunks, maxshape=maxshape)
        file.create_dataset("holes", SHAPE, ">f8", chunks=(4, 5, 6), compression="gzip", fillvalue=2.5)
        file["holes"][9] = 1
        file.create_dataset("h5py", data=data, chunks=(4, 2, 4), scaleoffset=0)
        file.create_dataset("checked", data=data, chunks=(4, 5, 6), fletcher32=True)
    return path


NAMES = ["rows", "rows plain", "pieces", "pieces plain", "one", "one plain", "all", "all plain", "holes", "h5py", "checked"]


def reader_of(path, name, axis=0, threads=1, memory="1 MiB"):
    readers = Readers(path, threads=threads, memory=Budget.of(memory))
    with opened(path) as file:
        return readers, readers.reader(layout_of(file[name], path, name, axis))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(data=st.data())
def test_rows_are_those_of_h5py(file, name, data):
    axis = data.draw(st.integers(0, 2))
    memory = data.draw(st.sampled_from([1, 500, 2000, 10_000, 2**20]))
    threads = data.draw(st.sampled_from([1, 1, 3]))
    length = SHAPE[axis]
    with h5py.File(file) as opened_file:
        expected = np.moveaxis(opened_file[name][()], axis, 0)
    readers, reader = reader_of(file, name, axis, threads, memory)
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            if data.draw(st.booleans()):
                reader.announce(np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1))))
            if data.draw(st.booleans()):
                start = data.draw(st.integers(0, length - 1))
                where = slice(start, data.draw(st.integers(start + 1, length)))
            else:
                where = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=60)))
            rows = reader.rows(where)
            assert rows.dtype == expected.dtype
            assert np.array_equal(rows, expected[where])
            assert rows.flags.writeable
            rows[...] = 0
            assert np.array_equal(reader.rows(where), expected[where])
    finally:
        readers.close()


@pytest.mark.parametrize("memory", [1, 2000, 2**20])
@pytest.mark.parametrize("name", ["rows", "pieces", "h5py"])
def test_many_threads_read_at_once(file, name, memory):
    readers, reader = reader_of(file, name, threads=2, memory=memory)
    with h5py.File(file) as opened_file:
        expected = opened_file[name][()]
    wrong = []

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(40):
            where = generator.integers(0, len(expected), 16)
            reader.announce(generator.integers(0, len(expected), 4))
            if not np.array_equal(reader.rows(where), expected[where]):
                wrong.append(where)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    readers.close()
    assert not wrong


def test_what_is_held_stays_within_the_budget_and_is_given_back(file):
    budget = Budget(3000)
    pairs = [reader_of(file, name, memory=budget) for name in ("rows", "holes", "pieces", "checked")]
    generator = np.random.default_rng(0)
    for _ in range(50):
        for _, reader in pairs:
            reader.rows(generator.integers(0, SHAPE[0], 8))
    # One chunk of each has to be there: 480, 960, 128 and 480 bytes.
    assert 480 <= budget.used <= budget.peak <= 3000
    for readers, _ in pairs:
        readers.close()
    del pairs, readers, reader, _
    gc.collect()
    assert budget.used == 0


def test_others_get_room_where_they_ask_for_it(file):
    budget = Budget(5000)
    readers, reader = reader_of(file, "rows", memory=budget)
    before = reader.rows(np.arange(37))
    assert budget.used > 4000
    others = Account(budget)
    assert others.begin(4500)
    assert budget.used <= 5000
    assert np.array_equal(reader.rows(np.arange(37)), before)
    readers.close()


def test_a_fork_has_its_own_cache(file):
    readers, reader = reader_of(file, "rows", threads=2)
    expected = reader.rows(np.arange(37))
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(reader.rows(np.arange(37)[::-1]), expected[::-1]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    readers.close()


def test_a_chunk_that_is_damaged_is_named_with_its_place(tmp_path):
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(400), chunks=(100,), compression="gzip")
        place = file["x"].id.get_chunk_info(2)
    with open(path, "r+b") as file:
        file.seek(place.byte_offset + place.size // 2)
        file.write(bytes(8))
    readers, reader = reader_of(path, "x")
    assert reader.rows(slice(0, 200)).tolist() == list(range(200))
    for _ in range(2):
        with pytest.raises(DataError, match=rf"'x' in .*: chunk \(2,\), {place.size} bytes from byte {place.byte_offset}"):
            reader.rows(slice(150, 250))
    assert reader.rows(np.array([399, 0])).tolist() == [399, 0]
    readers.close()


@pytest.mark.parametrize("memory", [1000, 2**20])
@pytest.mark.parametrize("chunks", [None, (4, 5, 6)])
def test_mapped_rows_are_within_the_budget_or_read_from_the_file(tmp_path, chunks, memory):
    path = str(tmp_path / "a.h5")
    data = np.arange(37 * 5 * 6, dtype=">i4").reshape(SHAPE)
    with h5py.File(path, "w") as file:
        file["before"] = np.zeros(3, "u1")
        file.create_dataset("x", data=data, chunks=chunks)
    for axis in (0,) if chunks else (0, 1, 2):
        budget = Budget(memory)
        readers, reader = reader_of(path, "x", axis, memory=budget)
        assert reader.layout.way == "mmap"
        expected = np.moveaxis(data, axis, 0)
        for where in (slice(1, 4), slice(0, len(expected)), np.array([3, 0, 3, 1]), np.array([len(expected) - 1])):
            assert np.array_equal(reader.rows(where), expected[where])
            assert budget.used <= memory
        assert bool(budget.used) == (memory > 1000)
        others = Account(budget)
        assert budget.used == 0 or others.begin(memory)
        assert np.array_equal(reader.rows(np.array([2, 1])), expected[[2, 1]])
        readers.close()


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of all chunks that are decoded."""
    numbers = []
    chunk = Direct.chunk
    monkeypatch.setattr(Direct, "chunk", lambda self, number, out: (numbers.append(number), chunk(self, number, out))[1])
    return numbers


def test_of_chunks_that_were_stored_as_they_are_no_more_is_read_than_is_wanted(tmp_path, decoded):
    """A compression that makes nothing smaller is left out by HDF5, chunk by chunk."""
    data = np.random.default_rng(0).integers(0, 256, (100, 1000), np.uint8)
    data[20:40] = 7
    with h5py.File(tmp_path / "a.h5", "w") as file:
        rows = file.create_dataset("x", data=data, chunks=(20, 1000), compression="lzf")
        assert [rows.id.get_chunk_info(n).filter_mask for n in range(5)] == [1, 0, 1, 1, 1]
    with hdf5(tmp_path / "a.h5", "x") as source:
        decoded.clear()
        for start in range(96):
            assert np.array_equal(source.take(np.arange(start, start + 5), 0).numpy(), data[start : start + 5])
        assert set(decoded) == {1}
        os.truncate(tmp_path / "a.h5", (tmp_path / "a.h5").stat().st_size - 3000)
        with pytest.raises(DataError, match=r"chunk \(4, 0\).* before byte"):
            source.take(np.arange(95, 100), 0)


@pytest.mark.parametrize(("datasets", "chunks_held", "threads"), [(1, 1, 2), (2, 4, 2), (2, 8, 4), (3, 8, 4)])
def test_reading_ahead_drives_nothing_out(tmp_path, decoded, datasets, chunks_held, threads):
    """In order, each chunk is decoded once, or little more often where there is room for no more than is in use."""
    chunks, rows = 10, 20
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in range(datasets):
            data = np.arange(chunks * rows * 16.0).reshape(-1, 16)
            file.create_dataset(str(name), data=data, chunks=(rows, 16), compression="gzip")
    with hdf5(tmp_path / "a.h5", threads=threads, memory=chunks_held * rows * 16 * 8) as source:
        for start in range(0, chunks * rows, 4):
            source.take(np.arange(start, start + 4), 0)
    assert len(decoded) <= 1.5 * datasets * chunks
