"""Joining HDF5 files: the result is np.concatenate of the parts, within the memory asked for."""

import os
import subprocess
import sys

import h5files
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functrain.core.errors import ArgumentError, DataError
from functrain.data import content_hash, h5concat, h5write, hdf5
from functrain.data.h5.sequences import righted
from functrain.data.h5.slabs import slabs


def read(path, name):
    with h5py.File(path) as file:
        return file[name][...]


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
    assert np.array_equal(read(tmp_path / "all.h5", "x"), np.concatenate([p["x"] for p in parts], axis))
    assert np.array_equal(read(tmp_path / "all.h5", "deep/y"), np.concatenate([p["deep"]["y"] for p in parts], axis))


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


# --- stored bytes, copied as they are ------------------------------------------------------------------------

FILTERS = [
    (),
    (("deflate", (4,)),),
    (("shuffle", ()), ("deflate", (1,)), ("fletcher32", ())),
    (("shuffle", ()),),
    (("fletcher32", ()), ("deflate", (4,))),
    (("lzf", ()),),
    (("szip", (4, 8)),),
    (("scaleoffset", (2, 0)),),
]


@st.composite
def alike(draw):
    """Files of one dataset each that can be joined along an axis, and that axis."""
    rank = draw(st.integers(1, 3))
    axis = draw(st.integers(0, rank - 1))
    chunks = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    shape = [draw(st.integers(1, 9)) for _ in range(rank)]
    dtype = draw(st.sampled_from(["<i4", ">f8", "u1", "odd"]))
    filters = draw(st.sampled_from(FILTERS if dtype == "<i4" and np.prod(chunks) >= 8 else FILTERS[:-2]))
    files = []
    for number in range(draw(st.integers(1, 3))):
        shape[axis] = draw(st.integers(0, 3)) * chunks[axis] if draw(st.booleans()) else draw(st.integers(0, 9))
        layout = draw(st.sampled_from(["chunked", "chunked", "chunked", "contiguous", "compact"]))
        dataset = h5files.Dataset(
            shape=tuple(shape),
            dtype=dtype,
            layout=layout,
            chunks=chunks,
            maxshape=(None,) * rank,
            filters=filters,
            fill=draw(st.sampled_from([None, None, 1, 7])) if dtype != "odd" else None,
            written=draw(st.sampled_from(["all", "all", "part", "nothing"])),
            whole_edges=draw(st.booleans()),
            unfiltered=layout == "chunked" and draw(st.booleans()),
            content="steps",
            seed=number,
        )
        files.append(h5files.File((dataset,), draw(st.sampled_from(["earliest", "latest"])), draw(st.sampled_from([0, 512]))))
    return files, axis


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(alike(), st.sampled_from([{}, {}, {"layout": "contiguous"}, {"chunks": 2, "checksum": True}, {"virtual": True}]))
def test_whatever_the_layouts_the_numbers_are_those_of_the_parts(tmp_path, drawn, options):
    files, axis = drawn
    paths = [tmp_path / f"{number}.h5" for number in range(len(files))]
    for path, described in zip(paths, files):
        h5files.write(path, described)
    h5concat(tmp_path / "all.h5", paths, axis, overwrite=True, **options)
    parts = [h5files.expected(path)["0"] for path in paths]
    # NumPy gives the machine's byte order back.
    joined = np.concatenate(parts, axis).astype(parts[0].dtype)
    found = read(tmp_path / "all.h5", "0")
    assert found.dtype == joined.dtype
    assert found.tobytes() == joined.tobytes()


def stored(path, name="x"):
    """The bytes of each chunk as they are in the file, by where it begins."""
    chunks = {}
    with h5py.File(path) as file, open(path, "rb") as raw:
        found = []
        file[name].id.chunk_iter(found.append)
        for chunk in found:
            raw.seek(chunk.byte_offset)
            chunks[chunk.chunk_offset] = (chunk.filter_mask, raw.read(chunk.size))
    return chunks


@pytest.mark.parametrize("userblock", [0, 1024])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("options", [{"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"}, {}])
def test_chunks_are_copied_with_their_bytes_and_masks(tmp_path, options, axis, userblock):
    draw = np.random.default_rng(0)
    paths, joined = [], {}
    for number in range(3):
        paths.append(tmp_path / f"{number}.h5")
        with h5py.File(paths[-1], "w", userblock_size=userblock) as file:
            # Numbers that lzf cannot make smaller, and skips, beside some that it can.
            array = np.concatenate([draw.integers(0, 2**62, (20, 30)), np.zeros((20, 30), int)])
            file.create_dataset("x", data=array, chunks=(10, 15), fillvalue=3, **options)
        for (row, column), chunk in stored(paths[-1]).items():
            joined[(row + 40 * number, column) if axis == 0 else (row, column + 30 * number)] = chunk
    h5concat(tmp_path / "all.h5", paths, axis)
    assert stored(tmp_path / "all.h5") == joined
    with h5py.File(tmp_path / "all.h5") as file, h5py.File(paths[0]) as first:
        for key in ("chunks", "compression", "compression_opts", "shuffle", "fletcher32", "fillvalue"):
            assert getattr(file["x"], key) == getattr(first["x"], key)


def test_levels_of_gzip_are_no_difference_and_chunks_are(tmp_path):
    paths = [tmp_path / f"{number}.h5" for number in range(3)]
    for path, (chunks, level) in zip(paths, [(4, 9), (4, 1), (2, 9)]):
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=np.arange(8), chunks=(chunks,), compression=level)
    h5concat(tmp_path / "all.h5", paths)
    (_, first), (_, second) = stored(paths[0])[(4,)], stored(paths[1])[(4,)]
    assert first != second
    assert [chunk for _, chunk in stored(tmp_path / "all.h5").values()][1:4:2] == [first, second]
    assert read(tmp_path / "all.h5", "x").tolist() == list(range(8)) * 3


UNREADABLE = """
import sys, h5py, hdf5plugin, numpy as np
if sys.argv[1] == "write":
    for number in range(2):
        with h5py.File(f"{number}.h5", "w") as file:
            file.create_dataset("x", data=np.arange(100) + number, chunks=(25,), **hdf5plugin.Zstd())
            file.create_dataset("y", data=np.arange(100) + number, chunks=(25,), **hdf5plugin.Bitshuffle(cname="zstd"))
else:
    with h5py.File("all.h5") as file:
        for name in "xy":
            assert file[name][...].tolist() == [*range(100), *range(1, 101)], name
"""


@pytest.mark.usefixtures("without_plugins")
def test_chunks_are_copied_without_the_package_that_decodes_them(tmp_path):
    def plugged(what):
        subprocess.run([sys.executable, "-c", UNREADABLE, what], check=True, cwd=tmp_path)

    plugged("write")
    h5concat(tmp_path / "all.h5", [tmp_path / "0.h5", tmp_path / "1.h5"])
    plugged("read")
    # Half a chunk to begin with: all that follows would have to be decoded.
    with pytest.raises(DataError, match=r"dataset '/[xy]' in .*[01]\.h5' cannot be"):
        h5concat(tmp_path / "most.h5", [tmp_path / "0.h5", tmp_path / "1.h5"], chunks=10)
    assert not (tmp_path / "most.h5").exists()


def test_filters_that_lose_digits_are_not_applied_twice(tmp_path):
    # Four bits hold what these chunks differ by, and not what those of the joined dataset would.
    paths = [tmp_path / f"{number}.h5" for number in range(2)]
    for number, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=np.arange(5) + 1000 * number, chunks=(10,), maxshape=(None,), scaleoffset=4)
    h5concat(tmp_path / "all.h5", paths)
    assert read(tmp_path / "all.h5", "x").tolist() == [0, 1, 2, 3, 4, 1000, 1001, 1002, 1003, 1004]


def test_contiguous_parts_stay_contiguous_and_begin_at_a_page(tmp_path):
    arrays = [np.random.default_rng(n).normal(size=(700, 300)) for n in range(2)]
    for n, array in enumerate(arrays):
        h5write(tmp_path / f"{n}.h5", {"x": array, "y": array[:, :1]})
    for axis in (0, 1):
        h5concat(tmp_path / "all.h5", [tmp_path / "0.h5", tmp_path / "1.h5"], axis, overwrite=True)
        with h5py.File(tmp_path / "all.h5") as file:
            assert file["x"].id.get_offset() % 4096 == 0
            assert np.array_equal(file["x"], np.concatenate(arrays, axis))
            assert np.array_equal(file["y"], np.concatenate([a[:, :1] for a in arrays], axis))


def test_parts_that_are_copied_and_parts_that_are_decoded_lie_side_by_side(tmp_path):
    lengths, joined = (5, 40_000, 7, 1, 30_000), []
    paths = [tmp_path / f"{n}.h5" for n in range(len(lengths))]
    for number, (path, length) in enumerate(zip(paths, lengths)):
        joined.append(np.full(length, number, "i2"))
        with h5py.File(path, "w") as file:
            # The first says that all is contiguous; every other one is not.
            file.create_dataset("x", data=joined[-1], chunks=(1,) if number % 2 and length == 1 else None)
            if number % 2:
                file.create_dataset("y", data=joined[-1])
    h5concat(tmp_path / "all.h5", paths, fill=-1)
    assert np.array_equal(read(tmp_path / "all.h5", "x"), np.concatenate(joined))
    # What is missing is filled first, and what is there then copied over that.
    filled = np.concatenate([array if number % 2 else np.full_like(array, -1) for number, array in enumerate(joined)])
    assert np.array_equal(read(tmp_path / "all.h5", "y"), filled)


def test_a_source_that_was_cut_short_leaves_no_destination(tmp_path):
    for options in ({}, {"chunks": (100,)}):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("x", data=np.arange(100_000.0), **options)
        os.truncate(tmp_path / "a.h5", 400_000)
        with pytest.raises(DataError, match=r"a\.h5' is truncated"):
            h5concat(tmp_path / "all.h5", [tmp_path / "a.h5"])
        assert os.listdir(tmp_path) == ["a.h5"]


# --- what is missing, and filled -----------------------------------------------------------------------------


def ragged(tmp_path, arrays, **options):
    paths = []
    for number, tree in enumerate(arrays):
        paths.append(tmp_path / f"part{number}.h5")
        h5write(paths[-1], tree, **options)
    return paths


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunks": 2, "compression": "gzip"}])
def test_shorter_ones_are_padded_and_missing_ones_filled(tmp_path, options, virtual):
    a, b, c = np.ones((2, 3)), np.full((4, 2), 2.0), np.full((1, 4), 3.0)
    paths = ragged(tmp_path, [{"x": a, "y": np.arange(2)}, {"x": b}, {"x": c, "y": np.arange(1), "g": {"z": c}}], **options)
    h5concat(tmp_path / "all.h5", paths, fill=-1, virtual=virtual)
    whole = np.full((7, 4), -1.0)
    whole[:2, :3], whole[2:6, :2], whole[6:] = a, b, c
    assert np.array_equal(read(tmp_path / "all.h5", "x"), whole)
    assert read(tmp_path / "all.h5", "y").tolist() == [0, 1, -1, -1, -1, -1, 0]
    assert np.array_equal(read(tmp_path / "all.h5", "g/z"), np.concatenate([np.full((6, 4), -1.0), c]))


def test_numbers_of_different_dtypes_get_one_that_holds_them_all(tmp_path):
    paths = ragged(tmp_path, [{"x": np.array([1, 2], "i4")}, {"x": np.array([0.5], "f4")}])
    h5concat(tmp_path / "all.h5", paths, fill=0)
    found = read(tmp_path / "all.h5", "x")
    assert (found.dtype, found.tolist()) == (np.dtype("f8"), [1, 2, 0.5])
    paths = ragged(tmp_path, [{"x": np.array([2**53 + 1])}, {"x": np.array([0.5], "f4")}], overwrite=True)
    with pytest.raises(DataError, match="float64, the dtype that all sources share, cannot hold"):
        h5concat(tmp_path / "more.h5", paths, fill=0)


@pytest.mark.parametrize(
    ("arrays", "fill", "error", "message"),
    [
        ([{"x": np.zeros(2)}, {"x": np.zeros(2, "S3")}], 0, DataError, "no dtype in common"),
        ([{"x": np.zeros((2, 1))}, {"x": np.zeros(2)}], 0, DataError, "ranks differ"),
        ([{"x": np.zeros((2, 2), "u1")}, {"x": np.zeros((2, 1), "u1")}], -1, ArgumentError, "fill=-1 is no value of .* uint8"),
        ([{"x": np.zeros((2, 2), int)}, {"x": np.zeros((2, 1), int)}], float("nan"), ArgumentError, "fill=nan is no value"),
        ([{"x": np.zeros((2, 2))}, {"x": np.zeros((2, 1))}], [1, 2], ArgumentError, "is no value"),
        ([{"x": np.zeros(2)}, {"y": np.zeros(2), "z": np.zeros(3)}], 0, DataError, r"'/x' is not in .*lengths \[2, 3\]"),
    ],
)
def test_what_cannot_be_filled_is_named(tmp_path, arrays, fill, error, message):
    paths = ragged(tmp_path, arrays)
    with pytest.raises(error, match=message):
        h5concat(tmp_path / "all.h5", paths, fill=fill)
    assert not (tmp_path / "all.h5").exists()


# --- two axes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 3, 1), "compression": "gzip"}])
@pytest.mark.parametrize("virtual", [False, True])
def test_rows_of_files_are_joined_along_two_axes(tmp_path, options, virtual):
    draw = np.random.default_rng(0)
    blocks = [[draw.normal(size=(height, 2, width)) for width in (3, 6)] for height in (4, 2, 5)]
    paths = [[tmp_path / f"{r}{c}.h5" for c in range(2)] for r in range(3)]
    for r in range(3):
        for c in range(2):
            h5write(paths[r][c], {"x": blocks[r][c].transpose(0, 2, 1)}, **options)
    h5concat(tmp_path / "all.h5", paths, axis=(0, 1), virtual=virtual)
    rows = [np.concatenate([block.transpose(0, 2, 1) for block in row], 1) for row in blocks]
    assert np.array_equal(read(tmp_path / "all.h5", "x"), np.concatenate(rows))


def test_rows_that_do_not_fit_are_refused_unless_filled(tmp_path):
    a, b = ragged(tmp_path, [{"x": np.zeros((2, 3))}, {"x": np.ones((3, 3))}])
    with pytest.raises(DataError, match="has 3 and 2 elements along axis 0 in the row"):
        h5concat(tmp_path / "all.h5", [[a, b]], axis=(0, 1))
    with pytest.raises(DataError, match=r"rows of \[6, 3\] elements along axis 1"):
        h5concat(tmp_path / "all.h5", [[a, a], [b]], axis=(0, 1))
    h5concat(tmp_path / "all.h5", [[a, b], [b]], axis=(0, 1), fill=7)
    whole = np.full((6, 6), 7)
    whole[:2, :3], whole[:3, 3:], whole[3:, :3] = 0, 1, 1
    assert np.array_equal(read(tmp_path / "all.h5", "x"), whole)
    for axis, sources in [((0, 1), [a, b]), (0, [[a, b]]), ((0, 1, 2), [[a]]), ((0, 1), [[a], []])]:
        with pytest.raises(ArgumentError, match=r"lists? of (lists of )?paths"):
            h5concat(tmp_path / "more.h5", sources, axis)
    with pytest.raises(DataError, match="are the same one"):
        h5concat(tmp_path / "more.h5", [[a, b]], axis=(0, -2))
    for axis, sources in [(0, [a, tmp_path / "gone.h5"]), ((0, 1), [[a, b], [b, tmp_path / "gone.h5"]])]:
        with pytest.raises(DataError, match=r"no file '.*gone\.h5'"):
            h5concat(tmp_path / "more.h5", sources, axis, fill=0)


# --- how it is told, and what comes with it ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunks": 3}, {"chunks": 3, "compression": "gzip"}])
def test_progress_rises_to_all_of_it(tmp_path, options):
    paths = ragged(tmp_path, [{"x": np.arange(30.0)}, {"x": np.arange(25.0)}], **options)
    told = []
    h5concat(tmp_path / "all.h5", paths, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 440)
    assert told[-1] == (440, 440)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > 2


def test_what_progress_raises_ends_it_and_leaves_nothing(tmp_path):
    paths = ragged(tmp_path, [{"x": np.arange(30.0)}])

    def stop(done, total):
        if done:
            raise FileNotFoundError("my own")

    with pytest.raises(FileNotFoundError, match="my own"):
        h5concat(tmp_path / "all.h5", paths, progress=stop)
    assert os.listdir(tmp_path) == ["part0.h5"]


def test_a_layout_can_be_asked_for(tmp_path):
    paths = ragged(tmp_path, [{"x": np.arange(40.0).reshape(20, 2)}] * 2, chunks=3, compression="gzip")
    h5concat(tmp_path / "a.h5", paths, layout="contiguous")
    h5concat(tmp_path / "b.h5", paths, chunks=7, compression="lzf", shuffle=True, checksum=True)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"].chunks is None
    with h5py.File(tmp_path / "b.h5") as file:
        assert (file["x"].chunks, file["x"].compression) == ((7, 2), "lzf")
        assert (file["x"].shuffle, file["x"].fletcher32) == (True, True)
        assert np.array_equal(file["x"], np.concatenate([np.arange(40.0).reshape(20, 2)] * 2))
    for options, message in [
        ({"layout": "rows"}, "layout must be one of 'contiguous', 'chunked', got 'rows'"),
        ({"layout": "contiguous", "compression": "gzip"}, "contiguous datasets have no chunks"),
        ({"virtual": True, "chunks": 3}, "a virtual dataset has the layout of its sources"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            h5concat(tmp_path / "c.h5", paths, **options)


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


@pytest.mark.parametrize("chunks", [None, 2])
@pytest.mark.parametrize(
    "parts",
    [
        [[[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]] * 2,
        [[[], [], []]] * 2,
        [[[1], [2], [3]], [[], [1]]],
        [[[1, 2]]],
        [[[]], [[1]], [[1, 2], [3], [4, 5]]],
    ],
)
def test_sequences_of_any_lengths_are_joined(tmp_path, parts, chunks):
    paths = []
    for number, sequences in enumerate(parts):
        paths.append(tmp_path / f"{number}.h5")
        with h5py.File(paths[-1], "w") as file:
            dataset = file.create_dataset(
                "x",
                (len(sequences),),
                h5py.vlen_dtype(">f4"),
                chunks=chunks and (chunks,),
                maxshape=(None,) if chunks else None,
            )
            for place, sequence in enumerate(sequences):
                dataset[place] = np.array(sequence, ">f4")
    h5concat(tmp_path / "all.h5", paths)
    found = read(tmp_path / "all.h5", "x")
    assert h5py.check_vlen_dtype(found.dtype) == np.dtype(">f4")
    # h5py 3.16 writes such numbers as they are, and reads them with their bytes swapped.
    right = [righted(sequence, np.dtype(">f4")).tolist() for sequence in found]
    assert right == [sequence for part in parts for sequence in part]


def test_sequences_of_different_numbers_are_refused(tmp_path):
    for name in ("f4", "f8"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("x", (2,), h5py.vlen_dtype(name))
    with pytest.raises(DataError, match=r"is sequences of float32 in .*, but sequences of float64 in .*convert one"):
        h5concat(tmp_path / "all.h5", [tmp_path / "f4.h5", tmp_path / "f8.h5"])


def packed(path, **attributes):
    with h5py.File(path, "w") as file:
        file["x"] = np.array([1, 2, -9], "i2")
        file["x"].attrs.update(attributes)
    return path


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"scale_factor": np.float32(0.1)}, {"scale_factor": np.float32(0.2)}, "scale_factor = 0.1 in .*, but 0.2 in"),
        ({"add_offset": 1}, {}, "add_offset = 1 in .*, but none in"),
        ({}, {"_FillValue": np.int16(-9)}, "_FillValue = none in .*, but -9 in"),
        ({"missing_value": -9}, {"missing_value": np.nan}, "missing_value = -9 in .*, but nan in"),
        ({"valid_min": 0}, {"valid_min": 1}, "valid_min"),
        ({"valid_max": 0}, {"valid_max": 1}, "valid_max"),
        ({"valid_range": [0, 5]}, {"valid_range": [0, 6]}, r"valid_range = \[0, 5\] in .*, but \[0, 6\] in"),
        ({"_Unsigned": "true"}, {"_Unsigned": "false"}, "_Unsigned = true in .*, but false in"),
    ],
)
def test_numbers_that_stand_for_others_in_each_file_are_refused(tmp_path, first, second, message, virtual):
    paths = [packed(tmp_path / "a.h5", **first), packed(tmp_path / "b.h5", **second)]
    with pytest.raises(DataError, match=rf"dataset '/x' has {message} .*b\.h5'.*unpack=True"):
        h5concat(tmp_path / "all.h5", paths, virtual=virtual)
    assert not (tmp_path / "all.h5").exists()


def test_what_packed_numbers_stand_for_is_joined_as_the_message_says(tmp_path):
    paths = [packed(tmp_path / f"{n}.h5", scale_factor=np.float32(n), _FillValue=np.int16(-9)) for n in (2, 3)]
    with pytest.raises(DataError, match=r"h5write\(destination, hdf5\(\[…\], unpack=True\)\)"):
        h5concat(tmp_path / "all.h5", paths)
    with hdf5(paths, unpack=True) as source:
        h5write(tmp_path / "all.h5", source)
    assert np.array_equal(read(tmp_path / "all.h5", "x"), [2, 4, np.nan, 3, 6, np.nan], equal_nan=True)


def test_packed_files_with_the_same_attributes_are_joined_and_keep_them(tmp_path):
    same = {"scale_factor": np.float32(0.5), "missing_value": np.nan, "valid_range": [-3.0, np.nan], "units": "K"}
    paths = [packed(tmp_path / "a.h5", **same), packed(tmp_path / "b.h5", **same | {"scale_factor": [0.5], "units": "C"})]
    h5concat(tmp_path / "all.h5", paths)
    with h5py.File(tmp_path / "all.h5") as file:
        assert file["x"][...].tolist() == [1, 2, -9] * 2
        assert file["x"].attrs["scale_factor"] == 0.5


def test_unsigned_numbers_in_signed_ones_are_not_widened(tmp_path):
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path, dtype in zip(paths, ["i1", "i2"]):
        with h5py.File(path, "w") as file:
            file["x"] = np.array([-1], dtype)
            file["x"].attrs["_Unsigned"] = "true"
    with pytest.raises(DataError, match=r"is int8 in .*, but int16 in"):
        h5concat(tmp_path / "all.h5", paths, fill=0)


@pytest.mark.parametrize("options", [{}, {"layout": "contiguous"}, {"shuffle": True, "compression": "gzip"}])
def test_a_file_alone_is_copied_whole_into_another_layout(tmp_path, options):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["g/x"] = np.arange(12.0).reshape(6, 2)
        file["g/scalar"], file["text"], file["null"] = 3, "ß", h5py.Empty("f4")
        file["words"] = np.array(["a", "ß"], dtype=h5py.string_dtype())
        file["none"] = np.zeros((0, 3))
        for name in ("g", "g/x", "g/scalar", "text", "null"):
            file[name].attrs["note"] = f"of {name}"
    h5concat(tmp_path / "b.h5", [tmp_path / "a.h5"], **options)
    with h5py.File(tmp_path / "a.h5") as old, h5py.File(tmp_path / "b.h5") as new:
        names = []
        new.visit(names.append)
        assert sorted(names) == ["g", "g/scalar", "g/x", "none", "null", "text", "words"]
        for name in names:
            assert dict(new[name].attrs) == dict(old[name].attrs)
        for name in ("g/x", "g/scalar", "text", "words", "none"):
            assert new[name].dtype == old[name].dtype
            assert np.array_equal(new[name][()], old[name][()])
        assert new["null"].shape is None
        assert new["g/x"].compression == options.get("compression")


def test_a_file_may_be_joined_with_itself(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.arange(3)})
    h5concat(tmp_path / "all.h5", [tmp_path / "a.h5"] * 2)
    assert read(tmp_path / "all.h5", "x").tolist() == [0, 1, 2, 0, 1, 2]


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
        (DataError, (target, [tmp_path / "scalar.h5"] * 2), "is a scalar"),
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
    for memory in (0, None, "much", 1.5, float("nan"), True):
        with pytest.raises(ArgumentError, match=f"memory takes a number of bytes .* got {memory!r}"):
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
    assert read(tmp_path / "all.h5", "x").shape == (24, 2**20)


def test_sequences_of_the_other_byte_order_keep_their_numbers(tmp_path):
    """h5py 3.16 hands them out with their bytes swapped."""
    for name, base in (("big", ">f4"), ("little", "<f4")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            rows = file.create_dataset("x", (2,), h5py.vlen_dtype(np.dtype(base)))
            rows[0], rows[1] = [1.0, 2.0], [3.0]
    big = tmp_path / "big.h5"
    assert content_hash(big) == content_hash(tmp_path / "little.h5")
    for options in ({}, {"layout": "contiguous"}, {"compression": "gzip"}):
        h5concat(tmp_path / "all.h5", [big, big], overwrite=True, **options)
        with hdf5(tmp_path / "all.h5", "x") as source:
            assert [source(i).tolist() for i in range(4)] == [[1, 2], [3], [1, 2], [3]]


def test_what_is_no_file_is_not_replaced_and_a_link_stays_one(tmp_path):
    h5write(tmp_path / "a.h5", {"x": np.arange(3)})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe' is a device, pipe or socket"):
        h5concat(tmp_path / "pipe", [tmp_path / "a.h5"], overwrite=True)
    (tmp_path / "link").symlink_to("b.h5")
    with pytest.raises(DataError, match=r"link' exists"):
        h5concat(tmp_path / "link", [tmp_path / "a.h5"])
    (tmp_path / "b.h5").touch(0o640)
    (tmp_path / "b.h5").chmod(0o640)
    h5concat(tmp_path / "link", [tmp_path / "a.h5"], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "b.h5").stat().st_mode & 0o777 == 0o640
    with hdf5(tmp_path / "b.h5") as source:
        assert len(source) == 3
