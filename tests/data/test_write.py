"""Writing HDF5: what is written reads back, and a file is there whole or not at all."""

import os
import subprocess
import sys
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from functrain.core.errors import ArgumentError, DataError
from functrain.data import arrays, h5write, hdf5, readmmap


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
        ({"x": np.zeros((4, 4))}, {"chunks": (2**70, 4)}, "chunks must be below"),
        ({"x": np.zeros((4, 4))}, {"compression": -1}, "-1 do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": 2**70}, "do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": [9]}, "do not suit 'x'"),
        ({3: np.zeros(2)}, {}, "got 3"),
        ({"x": np.zeros((4, 4))}, {"chunks": (4, 4, 4)}, "do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": "nonsense"}, "'nonsense' do not suit 'x'"),
        ({"x": np.zeros((4, 4))}, {"compression": "zstd"}, r"unavailable.*compression=hdf5plugin\.Zstd\(\)"),
        ({"x": np.zeros((4, 4))}, {"compression": 31999}, r"compression=hdf5plugin\.Zstd\(\)"),
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


# --- how it lies in the file ---------------------------------------------------------------------------------


def test_contiguous_datasets_begin_at_a_page(tmp_path):
    h5write(tmp_path / "a.h5", {"a": np.zeros(1001, "u1"), "b": np.ones(5001, "u1"), "c": np.ones((7, 999))})
    with h5py.File(tmp_path / "a.h5") as file:
        assert [file[name].id.get_offset() % 4096 for name in "bc"] == [0, 0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunks": 2}, "stored in chunks of 2x3, which may lie anywhere in the file, and an np.memmap shows a single stretch"),
        ({"chunks": (2, 1)}, "stored in chunks of 2x1, which may lie anywhere"),
        ({"compression": "gzip", "shuffle": True}, "stored in chunks of 4x3, encoded with shuffle.gzip, and an np.memmap"),
    ],
)
def test_what_cannot_be_mapped_is_told_with_the_reason(tmp_path, options, reason):
    h5write(tmp_path / "a.h5", {"x": np.zeros((4, 3))}, **options)
    with pytest.raises(DataError, match=rf"'x' in .*a\.h5' cannot be memory-mapped\. It is {reason}.*\. ft\.hdf5 reads it$"):
        readmmap(tmp_path / "a.h5", "x")


def test_filters_and_checksums_are_asked_for_by_name(tmp_path):
    array = np.arange(3000.0).reshape(300, 10)
    h5write(tmp_path / "a.h5", {"x": array}, compression="gzip", shuffle=True, checksum=True)
    h5write(tmp_path / "b.h5", {"x": array}, layout="chunked")
    h5write(tmp_path / "c.h5", {"x": array}, checksum=True, compression={"compression": "gzip", "compression_opts": 1})
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b, h5py.File(tmp_path / "c.h5") as c:
        assert (a["x"].compression, a["x"].shuffle, a["x"].fletcher32) == ("gzip", True, True)
        assert (b["x"].compression, b["x"].shuffle, b["x"].fletcher32, b["x"].chunks) == (None, False, False, (300, 10))
        assert (c["x"].compression, c["x"].compression_opts, c["x"].fletcher32) == ("gzip", 1, True)
        for file in (a, b, c):
            assert np.array_equal(file["x"], array)


PLUGIN = """
import sys
import h5py, hdf5plugin, numpy as np
from functrain.data import h5write
array = np.arange(1000).reshape(100, 10)
for number, given in enumerate([hdf5plugin.Zstd(clevel=5), hdf5plugin.Blosc(cname="lz4"), hdf5plugin.Bitshuffle()]):
    h5write(f"{sys.argv[1]}/{number}.h5", {"x": array}, compression=given)
    with h5py.File(f"{sys.argv[1]}/{number}.h5") as file:
        assert file["x"].id.get_create_plist().get_filter(0)[0] == given["compression"]
        assert np.array_equal(file["x"], array)
"""


def test_filters_of_hdf5plugin_are_passed_on(tmp_path):
    subprocess.run([sys.executable, "-c", PLUGIN, str(tmp_path)], check=True)


# --- batches as they come ------------------------------------------------------------------------------------


class Example(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    options=st.sampled_from([{}, {"chunks": 4}, {"chunks": (3, 1), "compression": "gzip"}, {"layout": "chunked"}]),
    known=st.booleans(),
)
def test_batches_of_any_size_are_written_one_behind_the_other(tmp_path, sizes, options, known):
    # Chunks that are larger than what is known to come are refused.
    assume(not (known and isinstance(options.get("chunks"), tuple) and 0 < sum(sizes) < 3))
    whole = np.random.default_rng(0).normal(size=(sum(sizes), 3))
    ends = np.cumsum(sizes)
    memory = np.empty((9, 3))

    def batches():
        for size, end in zip(sizes, ends):
            # All in the same memory, as some iterators do.
            memory[:size] = whole[end - size : end]
            yield {"x": memory[:size], "g": {"i": np.arange(end - size, end)[:, None]}}

    length = sum(sizes) if known else None
    h5write(tmp_path / "a.h5", batches(), overwrite=True, length=length, group="run", **options)
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["run/x"], whole)
        assert file["run/g/i"][:, 0].tolist() == list(range(sum(sizes)))
        if known and not options:
            assert file["run/x"].chunks is None
        elif sum(sizes) and not isinstance(options.get("chunks"), tuple):
            assert file["run/x"].chunks[1:] == (3,)


def test_a_source_is_written_element_by_element(tmp_path):
    x, y = torch.randn(1000, 20), torch.arange(1000)
    source = arrays({"x": x, "y": y}).shuffle(seed=3)
    # As little memory as to take a few rows at a time.
    h5write(tmp_path / "a.h5", source, memory=10_000)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"].chunks is None
        order = file["y"][...]
        assert sorted(order) == list(range(1000))
        assert order.tolist() == [int(element["y"]) for element in source]
        assert np.array_equal(file["x"], x.numpy()[order])
    h5write(tmp_path / "b.h5", arrays(x).repeat(), group="x", length=1500, compression="lzf")
    with h5py.File(tmp_path / "b.h5") as file:
        assert np.array_equal(file["x"], np.concatenate([x, x[:500]]))


def test_what_hdf5_reads_is_written_again_in_another_layout(tmp_path):
    array = np.random.default_rng(0).integers(0, 99, (500, 6))
    h5write(tmp_path / "a.h5", {"x": array}, chunks=(7, 2), compression="gzip")
    with hdf5(tmp_path / "a.h5") as source:
        h5write(tmp_path / "b.h5", source)
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["x"].chunks is None
        assert np.array_equal(file["x"], array)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_is_written_as_it_comes(tmp_path, workers):
    x, y = torch.randn(50, 4), torch.arange(50)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, num_workers=workers)
    told = []
    h5write(tmp_path / "a.h5", loader, progress=lambda done, total: told.append((done, total)))
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["0"], x)
        assert np.array_equal(file["1"], y)
        assert file["0"].maxshape == (None, 4)
    assert told[-1] == (50, None)
    h5write(tmp_path / "b.h5", (Example(*batch) for batch in loader), length=50)
    with h5py.File(tmp_path / "b.h5") as file:
        assert np.array_equal(file["y"], y)


def test_memory_stays_bounded_while_a_source_is_written(tmp_path):
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    grown = subprocess.run(command, check=True, capture_output=True, text=True)
    # Kibibytes: 128 MiB went through.
    assert int(grown.stdout) < 24 * 1024


PEAK = """
import resource, sys
import torch
from functrain.data import Source, h5write

class Rows(Source):
    def __init__(self, length):
        self.length = length
    def get(self, i, epoch):
        return {"x": torch.full((1 << 15,), float(i))}

h5write(sys.argv[1] + "/warm.h5", Rows(100), compression="lzf", memory="4 MiB")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
h5write(sys.argv[1] + "/a.h5", Rows(1000), compression="lzf", memory="4 MiB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def failing():
    yield {"x": np.zeros((2, 3))}
    raise FileNotFoundError("my own")


def test_what_an_iterator_raises_passes_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="my own"):
        h5write(tmp_path / "a.h5", failing())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "there are no batches"),
        ([{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}], {}, r"batch 1 has 'x' as \(2, 4\) float64: .* rows \(3,\)"),
        ([{"x": np.zeros(2)}, {"x": np.zeros(2, "f4")}], {}, "batch 1 has 'x' as .* float32"),
        ([{"x": np.zeros(2)}, {"y": np.zeros(2)}], {}, "batch 1 has y: the first has x"),
        ([{"x": np.zeros(2), "y": np.zeros(3)}], {}, r"arrays of batch 0 must have the same first dimension .* 'y': \(3,\)"),
        ([{"x": np.float64(1)}], {}, "same first dimension"),
        ([np.zeros(3)], {}, "needs a name"),
        ([{"x": np.zeros(3)}], {"length": 2}, "length=2, but up to batch 0 there are 3 rows"),
        ([{"x": np.zeros(3)}], {"length": 4}, "length=4, but the batches hold 3 rows"),
        ([{"x": np.zeros(3)}], {"layout": "contiguous"}, "contiguous datasets cannot grow"),
        ([{"x": ["text"]}], {}, "leaf 'x' is list"),
        ({"x": np.zeros(3)}, {"length": 3}, "arrays have theirs"),
        ({"x": np.zeros(3)}, {"length": True}, "length must be an int"),
        ({"x": np.zeros(3)}, {"shuffle": 1}, "shuffle takes True or False"),
        ({"x": np.zeros(3)}, {"layout": "rows"}, "layout must be one of"),
        ({"x": np.zeros(3)}, {"layout": "contiguous", "checksum": True}, "contiguous datasets have no"),
        ({"x": np.zeros(3)}, {"compression": {"level": 3}}, "compression takes"),
        (arrays(torch.zeros(3)).repeat(), {"group": "x"}, "no end: say how many"),
        (arrays(torch.zeros(3)), {"group": "x", "length": 4}, "the source has 3 elements"),
        (arrays(torch.zeros(3)).batch(2).deferred(), {"group": "x"}, "h5write needs examples"),
        (TensorDataset(torch.zeros(3)), {"group": "x"}, r"ft\.source\(dataset\), or a DataLoader"),
    ],
)
def test_batches_that_cannot_be_written_leave_nothing_behind(tmp_path, batches, options, message):
    with pytest.raises(ArgumentError, match=message):
        h5write(tmp_path / "a.h5", batches, **options)
    assert os.listdir(tmp_path) == []


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
