"""Joining HDF5 files: the result is np.concatenate of the parts, within the memory asked for."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.core.errors import ArgumentError, DataError
from functrain.data import h5concat, h5write, hdf5, readmmap
from functrain.data.h5.slabs import slabs


def part(path, n, lengths=(3, 4), **options):
    generator = np.random.default_rng(n)
    arrays = {
        "x": generator.normal(size=(lengths[0], lengths[1], 2)),
        "deep": {"y": generator.integers(0, 99, lengths)},
    }
    h5write(path, arrays, **options)
    return arrays


@pytest.mark.parametrize("memory", [1, 40, 2**26])
@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("options", [{}, {"chunks": 2, "compression": "gzip"}])
def test_the_result_is_the_parts_joined(tmp_path, axis, options, memory):
    lengths = [(3, 5), (1, 5), (7, 5)] if axis != 1 else [(3, 5), (3, 1), (3, 9)]
    paths = [tmp_path / f"{n}.h5" for n in range(3)]
    if axis == -2:
        # The second axis from the back is another one in each dataset.
        for n, path in enumerate(paths):
            h5write(path, {"x": np.full((3, n + 1, 2), n), "deep": {"y": np.full((n + 1, 5), n)}}, **options)
        parts = [{"x": np.full((3, n + 1, 2), n), "deep": {"y": np.full((n + 1, 5), n)}} for n in range(3)]
    else:
        parts = [part(path, n, lengths[n], **options) for n, path in enumerate(paths)]
    h5concat(tmp_path / "all.h5", paths, axis, memory=memory)
    assert np.array_equal(readmmap(tmp_path / "all.h5", "x"), np.concatenate([p["x"] for p in parts], axis))
    assert np.array_equal(readmmap(tmp_path / "all.h5", "deep/y"), np.concatenate([p["deep"]["y"] for p in parts], axis))


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple),
    memory=st.integers(1, 200),
    chunk=st.one_of(st.none(), st.integers(1, 4)),
)
def test_slabs_cover_once_within_memory(shape, memory, chunk):
    seen = np.zeros(shape, int)
    for slab in slabs(shape, 4, memory, None if chunk is None else (chunk,) * len(shape)):
        seen[slab] += 1
        assert seen[slab].size * 4 <= max(4, memory)
    assert (seen == 1).all()


def test_attributes_and_empty_groups_are_those_of_the_first(tmp_path):
    for n in range(2):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file["g/x"] = np.full(2, n)
            file.create_group("empty").attrs["note"] = f"empty {n}"
            file.attrs["title"] = f"file {n}"
            file["g"].attrs["scale"] = np.float32(n + 0.5)
            file["g/x"].attrs["names"] = np.array([b"a", b"b"])
            file["g/x"].attrs["nothing"] = h5py.Empty("f4")
            file["g/x"].attrs["reference"] = file["g"].ref
    h5concat(tmp_path / "all.h5", [tmp_path / "0.h5", tmp_path / "1.h5"])
    with h5py.File(tmp_path / "all.h5") as file:
        assert file.attrs["title"] == "file 0"
        assert file["g"].attrs["scale"] == np.float32(0.5)
        assert file["g"].attrs["scale"].dtype == np.float32
        assert file["empty"].attrs["note"] == "empty 0"
        assert file["g/x"].attrs["names"].tolist() == [b"a", b"b"]
        assert isinstance(file["g/x"].attrs["nothing"], h5py.Empty)
        assert "reference" not in file["g/x"].attrs


def test_dimension_scales_are_joined_without_their_references(tmp_path):
    for n in range(2):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file["x"] = np.full((2, 3), n)
            file["time"] = np.arange(2)
            file["time"].make_scale("time")
            file["x"].dims[0].attach_scale(file["time"])
    h5concat(tmp_path / "all.h5", [tmp_path / "0.h5", tmp_path / "1.h5"])
    assert hdf5(tmp_path / "all.h5").length == 4


def test_strings_and_links_are_joined_too(tmp_path):
    for n in range(2):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file["words"] = np.array([f"word {n}", "ß"], dtype=h5py.string_dtype())
            file["link"] = h5py.SoftLink("/words")
    h5concat(tmp_path / "all.h5", [tmp_path / "0.h5", tmp_path / "1.h5"])
    with h5py.File(tmp_path / "all.h5") as file:
        assert file["link"].asstr()[...].tolist() == ["word 0", "ß", "word 1", "ß"]


def test_a_file_may_be_joined_with_itself(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.arange(3)})
    h5concat(tmp_path / "all.h5", [tmp_path / "a.h5"] * 2)
    assert readmmap(tmp_path / "all.h5", "x").tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": np.zeros((2, 3))}, "dataset '/y' is in '.*a.h5', but not in '.*b.h5'"),
        (
            {"x": np.zeros((2, 3)), "y": np.zeros(2), "z": np.zeros(2)},
            "dataset '/z' is in '.*b.h5', but not in '.*a.h5'",
        ),
        ({"x": np.zeros((2, 4)), "y": np.zeros(2)}, r"\(2, 3\) in .*, but \(2, 4\) in .*axis 0 only"),
        ({"x": np.zeros((2, 3, 1)), "y": np.zeros(2)}, "ranks differ"),
        ({"x": np.zeros((2, 3), "f4"), "y": np.zeros(2)}, "is float64 in .*, but float32 in"),
        ({"x": np.zeros((2, 3)), "y": np.float64(1)}, "ranks differ"),
    ],
)
def test_parts_that_disagree_are_refused_before_anything_is_written(tmp_path, second, message):
    h5write(tmp_path / "a.h5", {"x": np.zeros((2, 3)), "y": np.zeros(2)})
    h5write(tmp_path / "b.h5", second)
    with pytest.raises(DataError, match=message):
        h5concat(tmp_path / "all.h5", [tmp_path / "a.h5", tmp_path / "b.h5"])
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "b.h5"]


def test_arguments_that_make_no_sense_are_named(tmp_path):
    source, target = tmp_path / "a.h5", tmp_path / "all.h5"
    h5write(source, {"x": np.zeros((2, 3)), "y": np.zeros(2)})
    with h5py.File(tmp_path / "scalar.h5", "w") as file:
        file["x"] = 1.0
    with h5py.File(tmp_path / "loop.h5", "w") as file:
        file["g/x"] = np.zeros(1)
        file["g/up"] = file["/"]
    with h5py.File(tmp_path / "dangling.h5", "w") as file:
        file["x"] = h5py.SoftLink("/nowhere")
    with h5py.File(tmp_path / "references.h5", "w") as file:
        file.create_dataset("x", (3,), h5py.ref_dtype)
    h5py.File(tmp_path / "bare.h5", "w").close()
    for error, arguments, message in [
        (ArgumentError, (target, []), "sources is empty"),
        (ArgumentError, (target, str(source)), "takes a list of paths"),
        (DataError, (target, [source, tmp_path / "gone.h5"]), "no file"),
        (
            DataError,
            (target, [source], 1),
            "dataset '/y' in .* has shape (2,): axis must lie in -1 … 0, got 1",
        ),
        (DataError, (target, [source], -2), "got -2"),
        (DataError, (target, [tmp_path / "scalar.h5"]), "is a scalar"),
        (DataError, (target, [tmp_path / "loop.h5"]), "only links to datasets"),
        (DataError, (target, [tmp_path / "dangling.h5"]), "leads nowhere"),
        (DataError, (target, [tmp_path / "references.h5"]), "holds references"),
        (DataError, (target, [tmp_path / "bare.h5"]), "holds no datasets"),
        (DataError, (source, [source]), "exists: pass overwrite=True"),
    ]:
        with pytest.raises(error) as caught:
            h5concat(*arguments)
        assert message.split(".*")[-1] in str(caught.value)
    with pytest.raises(ArgumentError, match="is one of the sources"):
        h5concat(source, [source], overwrite=True)
    for memory in (0, None, "1", 1.5, float("nan"), True):
        with pytest.raises(ArgumentError, match=f"memory must be .* got {memory!r}"):
            h5concat(target, [source], memory=memory)
    for axis in (1.0, "0", None, True):
        with pytest.raises(ArgumentError, match=f"axis must be an int, got {axis!r}"):
            h5concat(target, [source], axis)
    assert not target.exists()


def test_a_destination_is_replaced_when_asked(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.arange(2)})
    h5write(tmp_path / "all.h5", {"old": np.arange(2)})
    h5concat(tmp_path / "all.h5", [tmp_path / "a.h5"], overwrite=True)
    assert list(hdf5(tmp_path / "all.h5")(1)) == ["x"]


def test_a_damaged_source_leaves_no_destination(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(1000.0), chunks=(100,), fletcher32=True)
    with h5py.File(tmp_path / "a.h5") as file:
        offset = file["x"].id.get_chunk_info(7).byte_offset
    with open(tmp_path / "a.h5", "r+b") as raw:
        raw.seek(offset)
        # Not ff ff over 00 00, which are the same to a Fletcher checksum.
        raw.write(b"\x12\x34")
    with pytest.raises(DataError, match=r"dataset '/x' in '.*a\.h5' cannot be read"):
        h5concat(tmp_path / "all.h5", [tmp_path / "a.h5"])
    assert os.listdir(tmp_path) == ["a.h5"]


PEAK = """
import resource, sys
import h5py
from functrain.data import h5concat
target, part = sys.argv[1:]
h5concat(target + ".warm", [part.replace("big", "small")] * 2, memory=2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
h5concat(target, [part] * 3, memory=2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_bounded(tmp_path):
    h5write(tmp_path / "big.h5", {"x": np.ones((8, 2**20))})
    h5write(tmp_path / "small.h5", {"x": np.ones((8, 2**20 // 8))})
    command = [sys.executable, "-c", PEAK, str(tmp_path / "all.h5"), str(tmp_path / "big.h5")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True)
    # Kibibytes: three parts of 64 MiB each went through; twice the budget of 4 MiB covers the copies on the way.
    assert int(grown.stdout) < 2 * 4096 + 8192
    assert readmmap(tmp_path / "all.h5", "x").shape == (24, 2**20)
