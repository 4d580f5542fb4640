"""What h5advice says of a file: the layout at hand as it is, others as they would be, and nothing left behind."""

import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import pytest

from functrain.core.errors import ArgumentError, DataError
from functrain.data import h5advice, h5write, hdf5


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files are made; empty again when the test is over."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


def shelf(path):
    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        images = draw.integers(0, 9, (600, 32, 32, 3), "u1")
        file.create_dataset("images", data=images, chunks=(100, 8, 8, 3), compression="gzip")
        file["train/x"] = draw.normal(size=(3000, 64))
        file["train/y"] = np.arange(3000)
        file["words"] = np.array(["a", "b"], dtype=h5py.string_dtype())
        file["scalar"] = 1.0
        file["none"] = np.zeros((0, 3))
    return path


def test_each_dataset_is_told_of_as_it_is_and_as_it_might_be(tmp_path, scratch):
    path = shelf(tmp_path / "a.h5")
    advice = h5advice(path, batch=16, seconds=0.2)
    told = {each.name: each for each in advice.datasets}
    assert list(told) == ["/images", "/train/x", "/train/y", "/words"]
    assert advice.left_out == ()
    images = told["/images"]
    assert (images.shape, images.dtype, images.chunks_per_sample) == ((600, 32, 32, 3), "uint8", 16)
    names = [figures.layout for figures in images.figures]
    assert names == ["as it is: 100x8x8x3, gzip", "contiguous", "rows, shuffle+lzf", "rows, shuffle+gzip"]
    with h5py.File(path) as file:
        assert images.figures[0].stored == file["images"].id.get_storage_size()
        assert images.figures[1].stored == file["images"].nbytes
    assert images.figures[0].options is None
    assert "One sample lies in 16 chunks" in images.advice
    assert "h5write(new, hdf5(path, …), layout='contiguous')" in images.advice
    # By far: a row of it is a copy of 3 KB, and 16 chunks to be decoded before.
    assert images.figures[1].at_random > 3 * images.figures[0].at_random
    for each in advice.datasets[:2]:
        assert all(min(figures[3:]) > 0 for figures in each.figures)
    assert [figures.layout for figures in told["/train/x"].figures][:2] == ["as it is: not chunked", "rows, shuffle+lzf"]
    assert told["/train/x"].advice.startswith("Keep it")
    assert told["/train/y"].advice == "It is small: keep it."
    assert told["/words"].figures[0].at_random is None
    assert "No tensor" in told["/words"].advice


def test_the_advice_can_be_followed(tmp_path, scratch):
    path = shelf(tmp_path / "a.h5")
    (images,) = h5advice(path, "images", seconds=0.1).datasets
    for figures in images.figures[1:]:
        with hdf5(path, "images") as source:
            h5write(tmp_path / "b.h5", source, group="images", overwrite=True, **figures.options)
        with h5py.File(tmp_path / "b.h5") as file, h5py.File(path) as old:
            assert np.array_equal(file["images"], old["images"])
            # Measured on all of it, as it is smaller than a sample.
            assert file["images"].id.get_storage_size() == figures.stored


def test_it_reads_as_a_table(tmp_path, scratch):
    advice = h5advice(shelf(tmp_path / "a.h5"), "train", seconds=0.1)
    text = str(advice).splitlines()
    assert "random batches of 128" in text[0]
    assert text[2] == "/train/x (3000, 64) float64"
    assert text[3].split() == ["layout", "on", "disk", "MB/s", "in", "order", "random", "rows/s", "h5py:", "MB/s", "rows/s"]
    assert {len(line) for line in text[3:7]} == {len(text[3])}
    assert "1.5 MiB" in text[4]


def test_the_largest_are_measured(tmp_path, scratch):
    h5write(tmp_path / "a.h5", {f"x{n}": np.zeros((n + 1, 4)) for n in range(11)})
    advice = h5advice(tmp_path / "a.h5", seconds=0.1)
    assert [each.name for each in advice.datasets] == [f"/x{n}" for n in range(10, 2, -1)]
    assert advice.left_out == ("/x2", "/x1", "/x0")
    assert str(advice).endswith("not measured: /x2, /x1, /x0")


@pytest.mark.parametrize("chunks", [(1, 1), (500, 1), (7, 40), (600, 50)])
def test_chunks_of_any_shape_are_measured(tmp_path, scratch, chunks):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(600 * 50.0).reshape(600, 50), chunks=chunks, compression="lzf")
    (told,) = h5advice(tmp_path / "a.h5", "x", batch=5, seconds=0.05).datasets
    assert told.chunks_per_sample == -(-50 // chunks[1])
    assert all(min(figures[2:]) > 0 for figures in told.figures)


ZSTD = """
import sys
import hdf5plugin
from functrain.data import h5advice
told = h5advice(sys.argv[1], "images", seconds=0.1).datasets[0]
assert told.figures[-1].layout == "rows, shuffle+zstd", told
assert told.figures[-1].stored < told.figures[1].stored
"""


def test_zstd_is_tried_where_its_filter_is_there(tmp_path):
    subprocess.run([sys.executable, "-c", ZSTD, str(shelf(tmp_path / "a.h5"))], check=True)


def test_a_damaged_dataset_is_named_and_leaves_nothing(tmp_path, scratch):
    path = shelf(tmp_path / "a.h5")
    with h5py.File(path) as file:
        chunk = file["images"].id.get_chunk_info(40)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    with pytest.raises(DataError, match=r"dataset '/images' in .*a\.h5' cannot be read"):
        h5advice(path, seconds=0.1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("gone",), {}, DataError, "has no 'gone'"),
        (("none",), {}, DataError, "holds no datasets .* with rows"),
        (("scalar",), {}, DataError, "holds no datasets .* with rows"),
        ((), {"batch": 0}, ArgumentError, "batch must be at least 1"),
        ((), {"seconds": 0}, ArgumentError, "seconds must be a number above 0, got 0"),
        ((), {"seconds": float("nan")}, ArgumentError, "seconds must be"),
        ((), {"seconds": True}, ArgumentError, "seconds must be"),
    ],
)
def test_what_cannot_be_measured_is_named(tmp_path, scratch, arguments, options, error, message):
    with pytest.raises(error, match=message):
        h5advice(shelf(tmp_path / "a.h5"), *arguments, **options)
