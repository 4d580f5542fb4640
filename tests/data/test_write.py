"""Writing HDF5: what is written reads back, and a file is there whole or not at all."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError, DataError
from functrain.data import h5write, hdf5


def test_nested_dicts_become_groups(tmp_path):
    path = tmp_path / "a.h5"
    h5write(
        path,
        {"train": {"x": torch.ones(3, 2, requires_grad=True), "y": np.arange(3)}, "mean": np.float64(2.5)},
        group="/runs/1/",
    )
    with h5py.File(path) as file:
        assert file["runs/1/train/x"][...].tolist() == [[1, 1]] * 3
        assert file["runs/1/mean"][()] == 2.5
        assert file["runs/1/train/y"].chunks is None
    assert int(hdf5(path, "runs/1/train", datasets=["y"])(2)["y"]) == 2


def test_a_bare_array_takes_its_name_from_group(tmp_path):
    h5write(tmp_path / "a.h5", np.arange(4), group="x")
    assert int(hdf5(tmp_path / "a.h5", "x")(3)) == 3


@pytest.mark.parametrize(
    ("options", "chunks", "compression"),
    [
        ({"chunks": 4}, (4, 8, 8), None),
        ({"chunks": 400}, (50, 8, 8), None),
        ({"chunks": (5, 8, 2)}, (5, 8, 2), None),
        ({"compression": "gzip"}, (50, 8, 8), "gzip"),
        ({"compression": 1, "chunks": 10}, (10, 8, 8), "gzip"),
        ({"compression": "lzf"}, (50, 8, 8), "lzf"),
    ],
)
def test_chunks_hold_whole_rows(tmp_path, options, chunks, compression):
    array = np.random.default_rng(0).normal(size=(50, 8, 8))
    h5write(tmp_path / "a.h5", {"x": array, "scalar": np.float32(1), "none": np.zeros((0, 2))}, **options)
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file["x"].chunks, file["x"].compression) == (chunks, compression)
        assert np.array_equal(file["x"][...], array)


def test_large_rows_are_chunked_by_about_a_mebibyte(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.zeros((100, 256, 1024), "u1")}, compression="lzf")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"].chunks == (4, 256, 1024)


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.zeros(1)})
    with pytest.raises(DataError, match="overwrite=True"):
        h5write(path, {"x": np.ones(1)})
    assert float(hdf5(path)(0)["x"]) == 0.0
    h5write(path, {"x": np.ones(1)}, overwrite=True)
    assert float(hdf5(path)(0)["x"]) == 1.0
    assert os.listdir(tmp_path) == ["a.h5"]


def test_the_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    h5write(tmp_path / "a.h5", {"x": np.zeros(1)})
    assert (tmp_path / "a.h5").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("tree", "options", "message"),
    [
        ({}, {}, "no leaves"),
        (np.zeros(3), {}, "needs a name"),
        ({"x": [1, 2]}, {}, "leaf 'x' is list"),
        ({"a": {"x": np.array(["text"])}}, {}, "leaf 'a/x' is an array of <U4"),
        ({"x": torch.zeros(2).bfloat16()}, {}, r"takes it as \.float\(\)"),
        ({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, {}, r"'x' is a torch.float8_e4m3fn .* takes it as \.float\(\)"),
        ({"x": torch.zeros(2, device="meta")}, {}, "leaf 'x' is a torch.float32 tensor"),
        ({"x": np.array(["2020-01-01"], "M8[D]")}, {}, r"leaf 'x' is an array of datetime64\[D\].*astype"),
        ({"x": np.zeros(2, [("when", "M8[D]")])}, {}, "leaf 'x' is an array of .*when"),
        ({"x": np.zeros(2, [("a", "O")])}, {}, "leaf 'x' is an array of .*'O'"),
        ({"x": np.zeros(2, [("a", "U3")])}, {}, "leaf 'x' is an array of .*U3"),
        ({"a/b": np.zeros(2)}, {}, "without '/'"),
        ({"a\0x": np.zeros(2)}, {}, r"got 'a\\x00x'"),
        ({"\ud800": np.zeros(2)}, {}, r"got '\\ud800'"),
        ({"": np.zeros(2)}, {}, "got ''"),
        ({"x": np.zeros(2)}, {"group": "a\0b"}, "group 'a.x00b'"),
        ({"x": np.zeros(2)}, {"group": "a//b"}, "group 'a//b'"),
        ({"x": np.zeros(2)}, {"group": 5}, "group takes the name of a group, got 5"),
        ({"x": np.zeros((4, 4))}, {"chunks": -1}, "chunks must be at least 1, got -1"),
        ({"x": np.zeros((4, 4))}, {"chunks": "a"}, "chunks must be an int, got 'a'"),
        ({"x": np.zeros((4, 4))}, {"chunks": True}, "chunks must be an int, got True"),
        ({"x": np.zeros((4, 4))}, {"chunks": (2, 0)}, "chunks must be at least 1, got 0"),
        ({"x": np.zeros((4, 4))}, {"chunks": (2, 2.5)}, "chunks must be an int, got 2.5"),
        ({"x": np.zeros((4, 4))}, {"chunks": (2**70, 4)}, "do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": -1}, "-1 do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": 2**70}, "do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": [9]}, "do not suit 'x'"),
        ({3: np.zeros(2)}, {}, "got 3"),
        ({"x": np.zeros((4, 4))}, {"chunks": (4, 4, 4)}, "do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": "nonsense"}, "'nonsense' do not suit 'x'"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, tree, options, message):
    with pytest.raises(ArgumentError, match=message):
        h5write(tmp_path / "a.h5", tree, **options)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(DataError, match="no directory"):
        h5write(tmp_path / "no" / "a.h5", {"x": np.zeros(1)})
    with pytest.raises(DataError, match="is a directory"):
        h5write(tmp_path, {"x": np.zeros(1)}, overwrite=True)


KILLED = """
import os, signal, sys
import numpy as np
from functrain.data.h5.output import replacing
with replacing(sys.argv[1], overwrite=True) as output:
    output.file["x"] = np.ones(100_000)
    output.file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.h5"
    h5write(path, {"x": np.zeros(10)})
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -9
    assert hdf5(path).length == 10
    assert len(list(tmp_path.iterdir())) == 2
