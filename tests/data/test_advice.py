"""What h5advice says of a file: the layout at hand as it is, others as they would be, and nothing left behind."""

import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import pytest

from functrain.core.errors import ArgumentError, DataError
from functrain.data import h5advice, h5concat, h5write, hdf5
from functrain.data.h5.verdict import Figures, sentence


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files are made; empty again when the test is over."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


def call(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


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
    # Zstd is tried too where another test of this process has brought it.
    names = [figures.layout for figures in images.figures if "zstd" not in figures.layout]
    assert names == ["as it is: 100x8x8x3, gzip", "contiguous", "rows, shuffle+lzf", "rows, shuffle+gzip"]
    with h5py.File(path) as file:
        assert images.figures[0].stored == file["images"].id.get_storage_size()
        assert images.figures[1].stored == file["images"].nbytes
    assert images.figures[0].options is None
    assert "One sample lies in 16 chunks" in images.advice
    assert any(
        f"Write the file so: h5concat(new, [path], {call(each.options)})." in images.advice for each in images.figures[1:]
    )
    # By far: a row of it is a copy of 3 KB, and 16 chunks to be decoded before.
    assert images.figures[1].at_random > 1.3 * images.figures[0].at_random
    for each in advice.datasets[:2]:
        assert all(min(figures[3:]) > 0 for figures in each.figures)
    assert [figures.layout for figures in told["/train/x"].figures][:2] == ["as it is: not chunked", "rows, shuffle+lzf"]
    rows = told["/train/x"]
    assert rows.advice == sentence(list(rows.figures), 1, False, False)
    assert told["/train/y"].advice == "It is small: keep it."
    assert told["/words"].figures[0].at_random is None
    assert "No tensor" in told["/words"].advice


def test_the_advice_can_be_followed(tmp_path, scratch):
    path = shelf(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        file["images"].attrs["scale_factor"] = np.float32(0.5)
    (images,) = h5advice(path, "images", seconds=0.1).datasets
    for figures in images.figures[1:]:
        h5concat(tmp_path / "b.h5", [path], overwrite=True, **figures.options)
        with hdf5(tmp_path / "b.h5", "images", unpack=True) as new, hdf5(path, "images", unpack=True) as source:
            assert new(7).equal(source(7))
            assert new(7).is_floating_point()
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


def test_sequences_of_variable_length_are_named_and_the_others_advised(tmp_path, scratch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, lengths in (("mixed", np.arange(300) % 5), ("alike", np.full(300, 4)), ("none", np.zeros(300, int))):
            file.create_dataset(name, (300,), h5py.vlen_dtype("f4"))
            for place, length in enumerate(lengths):
                file[name][place] = np.arange(length, dtype="f4")
        file["x"] = np.zeros((1000, 8))
    told = {each.name: each for each in h5advice(tmp_path / "a.h5", seconds=0.1).datasets}
    for name in ("/mixed", "/alike", "/none"):
        assert told[name].dtype == "variable-length float32"
        assert told[name].advice == "No other layout is measured of sequences of variable length."
        assert told[name].figures[0].at_random is None
    assert told["/x"].advice == "It is small: keep it."


def measured(layout, stored, speed):
    return Figures(layout, {"layout": layout}, stored, speed, speed, speed, speed)


@pytest.mark.parametrize(
    ("others", "advised"),
    [
        ([(1000, 129)], None),
        ([(1000, 131)], "a"),
        ([(801, 100)], None),
        ([(800, 100)], "a"),
        # Smaller, and slower by more than what is chance.
        ([(100, 70)], None),
        # Of those that are about as fast as the fastest, the smallest.
        ([(900, 1000), (700, 800), (100, 700)], "b"),
        # None that is not faster itself.
        ([(900, 131), (500, 129)], "a"),
    ],
)
def test_another_layout_is_advised_where_it_gains_more_than_chance(others, advised):
    now = measured("now", 1000, 100.0)
    rest = [measured(name, stored, speed) for name, (stored, speed) in zip("abc", others)]
    text = sentence([now, *rest], 1, True, False)
    assert text.startswith(f"{advised} would read" if advised else "Keep it")


def test_measured_numbers_have_two_figures():
    text = sentence([measured("now", 1000, 1.0), measured("a", 1000, 9169.8)], 1, False, False)
    assert "random rows 9,200 times as fast, rows in order 9,200 times," in text
    text = sentence([measured("now", 1000, 1.0), measured("a", 1000, 1.3499)], 1, False, False)
    assert "random rows 1.3 times as fast" in text


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
