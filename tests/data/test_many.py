"""Several files and several groups as one source: their order, what they share, how many are open, what goes wrong."""

import multiprocessing
import os
import resource
import threading
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError, DataError
from functrain.data import episodes, h5write, hdf5
from functrain.data.budget import Budget
from functrain.data.laws import check_source

LENGTHS = [5, 1, 3, 8, 2, 4, 7, 6, 1, 2, 3]


def write_files(folder, lengths=LENGTHS, **storage):
    """demo_0.h5 …, whose y count on from file to file and whose x are y, twice."""
    starts = np.cumsum([0, *lengths])
    for number, (start, length) in enumerate(zip(starts.tolist(), lengths)):
        y = np.arange(start, start + length)
        h5write(folder / f"demo_{number}.h5", {"x": np.stack([y, y], 1).astype("f4"), "y": y}, **storage)
    return int(starts[-1])


@pytest.mark.parametrize("storage", [{}, {"chunks": 2, "compression": "gzip"}])
def test_a_pattern_names_files_in_natural_order(tmp_path, storage):
    total = write_files(tmp_path, **storage)
    with hdf5(tmp_path / "demo_*.h5", threads=2) as source:
        assert [int(element["y"]) for element in source] == list(range(total))
        order = np.random.default_rng(0).integers(0, total, 60)
        taken = source.take(order, 0)
        assert taken["y"].tolist() == order.tolist()
        assert taken["x"].tolist() == [[n, n] for n in order.tolist()]
        check_source(source)
        assert [len(part) for part in source.inner] == LENGTHS
        text = str(source.explain())
        assert "files: 11" in text
        assert "… 7 more" in text
        assert text.count("demo_") == 4
    with hdf5([tmp_path / "demo_2.h5", str(tmp_path / "demo_1?.h5"), tmp_path / "demo_0.h5"], "y") as source:
        assert [int(y) for y in source] == [6, 7, 8, total - 3, total - 2, total - 1, 0, 1, 2, 3, 4]


def test_episodes_are_the_files(tmp_path):
    total = write_files(tmp_path)
    with hdf5(tmp_path / "demo_*.h5", "y") as source:
        runs = episodes(source)
        assert runs.lengths.tolist() == LENGTHS
        assert runs(10).tolist() == [total - 3, total - 2, total - 1]
        windows = runs.windows(3, stride=2)
        inside = set(range(total)) - set(np.cumsum(LENGTHS).tolist())
        assert all(set(window.tolist()[1:]) <= inside for window in windows)
        check_source(windows.shuffle(seed=0).batch(4))


def robot(path):
    with h5py.File(path, "w") as file:
        for number, length in enumerate(LENGTHS):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.full((length, 2), number, "f4")
            group["obs/joint"] = np.full((length, 3), number, "f8")
            group["obs/step"] = np.arange(length)
        file["data/demo_3/only"] = np.zeros(8)
        file["data/odd[1]/x"] = np.arange(4)
        file["mask/train"] = np.zeros(3)


def test_patterns_in_groups(tmp_path):
    robot(tmp_path / "a.h5")
    numbers = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    with hdf5(tmp_path / "a.h5", "data/demo_*/obs") as source:
        batch = source.batch(len(source))(0)
        assert sorted(batch) == ["joint", "step"]
        assert batch["joint"][:, 1].tolist() == numbers.tolist()
        check_source(source)
    with hdf5(tmp_path / "a.h5", "/data/*/actions") as bare:
        assert bare.batch(len(bare))(0)[:, 0].tolist() == numbers.tolist()
        assert episodes(bare).lengths.tolist() == LENGTHS
    with h5py.File(tmp_path / "lost.hdf5", "w") as file:
        file["demo_1/x"], file["demo_2"] = np.zeros(3), h5py.SoftLink("/nowhere")
    for group in ("demo_*", "demo_*/x"):
        # What cannot be opened might be one of them.
        with pytest.raises(DataError, match=r"'demo_2' in .* leads nowhere"):
            hdf5(tmp_path / "lost.hdf5", group)
    assert hdf5(tmp_path / "a.h5", "data/odd[1]")(3) == {"x": torch.tensor(3)}
    assert len(hdf5(tmp_path / "a.h5", "data/demo_[12]", datasets=["obs/step"])) == LENGTHS[1] + LENGTHS[2]
    (tmp_path / "more").mkdir()
    robot(tmp_path / "more" / "b.h5")
    with hdf5(tmp_path / "**" / "*.h5", "data/demo_*", datasets=["actions"]) as both:
        assert len(both) == 2 * sum(LENGTHS)
        assert [part.group for part in both.inner] == [f"data/demo_{n}" for n in range(len(LENGTHS))] * 2


def test_what_is_not_alike_or_not_there_is_named(tmp_path):
    robot(tmp_path / "a.h5")
    total = write_files(tmp_path)
    h5write(tmp_path / "wide.h5", {"x": np.zeros((3, 3), "f4"), "y": np.arange(3)})
    h5write(tmp_path / "double.h5", {"x": np.zeros((3, 2)), "y": np.arange(3)})
    h5write(tmp_path / "more.h5", {"x": np.zeros((3, 2), "f4"), "y": np.arange(3), "z": np.arange(3)})
    first = tmp_path / "demo_0.h5"
    for other, message in [
        ("wide.h5", r"demo_0\.h5' and .*wide\.h5' disagree \(x: \(2,\) float32 and \(3,\) float32\)"),
        ("double.h5", r"x: \(2,\) float32 and \(2,\) float64"),
        ("more.h5", "unexpected 'z'"),
        ("a.h5", "holds no datasets"),
        ("nowhere.h5", "no file"),
    ]:
        with pytest.raises(DataError, match=message):
            hdf5([first, tmp_path / other])
    assert len(hdf5([first, tmp_path / "more.h5"], datasets=["x", "y"])) == LENGTHS[0] + 3
    for group, message in [
        ("data/none_*", "matches group='data/none_\\*': 'data' holds 'demo_0'"),
        ("data/demo_*/none", "matches group='data/demo_"),
        ("data/demo_*", r"'data/demo_0' in .* and 'data/demo_3' in .* disagree .*unexpected 'only'"),
        ("*/*/x/*", "matches"),
    ]:
        with pytest.raises(DataError, match=message):
            hdf5(tmp_path / "a.h5", group)
    with pytest.raises(DataError, match=r"no file matches '.*none_\*\.h5'"):
        hdf5(tmp_path / "none_*.h5")
    for path, message in [
        ([], "empty list"),
        ([[first]], "path of a file"),
        (3, "a list of them, got 3"),
        (b"a.h5", "path"),
        ("memory://data/*.h5", "give a list of URLs"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            hdf5(path)
    with pytest.raises(ArgumentError, match="length holds fast the length of one file"):
        hdf5([first], length=2)
    os.rename(first, tmp_path / "demo[0].h5")
    assert len(hdf5(tmp_path / "demo[0].h5")) == LENGTHS[0] < total


def test_all_files_share_one_budget_and_one_pool(tmp_path):
    budget = Budget("64 KiB")
    for number in range(12):
        h5write(tmp_path / f"{number}.h5", {"x": np.full((64, 32), number, "f8")}, chunks=16, compression="gzip")
    before = set(threading.enumerate())
    with hdf5(tmp_path / "*.h5", "x", threads=2, memory=budget) as source:
        for batch in source.shuffle(seed=0).batch(48):
            assert batch.shape == (48, 32)
        started = set(threading.enumerate()) - before
        assert len(started) <= 2
        assert all(thread.name.startswith("functrain") for thread in started)
        assert 0 < budget.peak <= budget.limit
    assert not any(thread.is_alive() for thread in started)


# --- more files than may be open ---------------------------------------------------------------------------------------


@contextmanager
def few_descriptors(number):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def shelved(tmp_path):
    """A source over 40 files, of which 16 are open at a time."""
    write_files(tmp_path, [3] * 40, chunks=2, compression="gzip")
    with few_descriptors(128), hdf5(tmp_path / "demo_*.h5") as source:
        yield source


def test_a_bounded_number_of_files_is_open(tmp_path, shelved):
    for _ in range(2):
        assert [int(element["y"]) for element in shelved] == list(range(120))
        held = {
            os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{name}")
        }
        assert len([path for path in held if path.startswith(str(tmp_path))]) <= 16
    assert shelved.take(np.arange(120)[::-1].copy(), 0)["y"].tolist() == list(range(120))[::-1]


def test_many_threads_read_more_files_than_may_be_open(shelved):
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 120, 100).tolist():
            if int(shelved(i)["y"]) != i:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_was_there(tmp_path, shelved):
    assert int(shelved(0)["y"]) == 0
    h5write(tmp_path / "demo_0.h5", {"x": np.zeros((3, 2), "f4"), "y": np.full(3, 7)}, chunks=2, overwrite=True)
    assert int(shelved(0)["y"]) == 0
    assert len(list(shelved.shard(1, 40))) == 3
    for i in range(3, 120, 3):
        shelved(i)
    with pytest.raises(DataError, match=r"demo_0\.h5' was replaced or changed since"):
        shelved(0)
    assert int(shelved.refreshed()(0)["y"]) == 7


def read_all(source, answer):
    answer.put([int(element["y"]) for element in source])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_many_files_are_read_on_both_sides_of_a_fork(tmp_path):
    total = write_files(tmp_path, chunks=2, compression="gzip")
    with hdf5(tmp_path / "demo_*.h5", threads=2) as source:
        assert len(source.batch(30)(0)["y"]) == 30
        context = multiprocessing.get_context("fork")
        answer = context.SimpleQueue()
        child = context.Process(target=read_all, args=(source, answer))
        child.start()
        assert answer.get() == list(range(total))
        child.join()
        assert child.exitcode == 0
        assert [int(element["y"]) for element in source] == list(range(total))


def test_closing_one_closes_all(tmp_path):
    write_files(tmp_path)
    source = hdf5(tmp_path / "demo_*.h5")
    source.batch(9)(0)
    source.close()
    source.close()
    for read in (lambda: source(0), lambda: source.inner[3](0), lambda: episodes(source)(2)):
        with pytest.raises(DataError, match="was closed"):
            read()
    assert "demo_" in str(source.explain())
    with h5py.File(tmp_path / "demo_3.h5", "r+") as file:
        assert len(file["y"]) == 8


def test_a_name_may_be_another_and_a_number(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/v"], file["train2/v"], file["train10/v"] = [1, 2], [3], [4]
    with hdf5(tmp_path / "a.h5", "train*/v") as source:
        assert [int(source(i)) for i in range(4)] == [1, 2, 3, 4]
