"""Every combination of layout, filters, dtype, byte order, rank, edges, fill and file gives the array that h5py gives."""

import math
import re

import numpy as np
import pytest
from h5files import COMPOUNDS, Dataset, File, writing
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.core import tree
from functrain.data import hdf5

NUMBERS = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
DTYPES = [order + name for name in [*NUMBERS, "enum"] for order in "<>"]
SHUFFLE, FLETCHER = ("shuffle", ()), ("fletcher32", ())
DIRECT = [
    (),
    *((("deflate", (level,)),) for level in (0, 1, 9)),
    (SHUFFLE,),
    (FLETCHER,),
    (SHUFFLE, ("deflate", (4,))),
    (("deflate", (4,)), FLETCHER),
    (SHUFFLE, ("deflate", (4,)), FLETCHER),
    (FLETCHER, SHUFFLE, ("deflate", (6,))),
    (("deflate", (1,)), SHUFFLE),
    (("lzf", ()),),
    (SHUFFLE, ("lzf", ())),
    (SHUFFLE, ("lzf", ()), FLETCHER),
]
# As hdf5plugin sets them: bitshuffle's block and codec; blosc's level, shuffle and codec behind four of its own.
PLUGIN = [
    (("zstd", (3,)),),
    (SHUFFLE, ("zstd", (1,)), FLETCHER),
    (("lz4", ()),),
    (("lz4", (64,)),),
    (SHUFFLE, ("lz4", ())),
    *((("bitshuffle", (0, codec)),) for codec in (0, 2, 3)),
    (("bitshuffle", (16, 2)), FLETCHER),
    *((("blosc", (0, 0, 0, 0, 5, shuffle, codec)),) for shuffle in (0, 1, 2) for codec in (0, 1, 2, 4, 5)),
]
ONLY_HDF5 = [(("szip", (32, 4)),), (("szip", (4, 2)),), (("nbit", ()),), (("scaleoffset", (2, 0)),)]
HDF5, HDF5PLUGIN = st.sampled_from([*DIRECT, *ONLY_HDF5]), st.sampled_from(PLUGIN)


@pytest.fixture(scope="module")
def writer():
    with writing() as process:
        yield process


@st.composite
def datasets(draw, rows, axis, filters):
    layout = draw(st.sampled_from(["chunked"] * 8 + ["contiguous"] * 2 + ["compact", "virtual", "external"]))
    rank = draw(st.integers({-1: 1}.get(axis, axis + 1), 4))
    side = {1: 150, 2: 40, 3: 9, 4: 5}[rank]
    shape = [draw(st.integers(1, side)) for _ in range(rank)]
    shape[axis] = rows
    given = {
        "shape": tuple(shape),
        "dtype": draw(st.sampled_from([*DTYPES, *COMPOUNDS])),
        "layout": layout,
        "fill": draw(st.sampled_from([None, 0, 1])),
        "written": draw(st.sampled_from(["all", "all", "part", "none"])),
        "content": draw(st.sampled_from(["noise", "steps", "levels"])),
        "seed": draw(st.integers(0, 99)),
        "before": draw(st.sampled_from([0, 1, 3])),
    }
    if layout == "compact" and math.prod(shape) > 1000:
        # A header holds less than 64 KiB.
        given |= {"layout": "contiguous"}
    if layout == "contiguous":
        given |= {"allocated": draw(st.sampled_from(["DEFAULT", "EARLY"]))}
    if layout == "external":
        # Without a first write there is no such file.
        given |= {"written": "all"}
    if layout == "chunked":
        given |= draw(chunkings(given["shape"], given["dtype"], filters))
    if not given.get("whole_edges", True):
        # HDF5 2.0 does not grow such datasets right: it gives errors, or leaves chunks that it cannot read.
        given |= {"steps": ()}
    # A dtype with parts has no fill value that is one number, nor does an enum have 1 alone.
    if given["dtype"] in COMPOUNDS:
        given |= {"fill": None}
    return Dataset(**given)


@st.composite
def chunkings(draw, shape, dtype, filters):
    """Chunks, of any size and number, and what HDF5 does with them on the way."""
    chosen = draw(filters)
    names = [name for name, _ in chosen]
    free = draw(st.booleans())
    chunks = tuple(draw(st.integers(1, size + 3 if free else size)) for size in shape)
    if "szip" in names and math.prod(chunks) < 4:
        chosen = ()
    if {"szip", "nbit", "scaleoffset"} & {*names} and (dtype in COMPOUNDS or dtype[1:] in ("?", "enum", "f2", "c8", "c16")):
        chosen = ()
    given = {"chunks": chunks, "filters": chosen}
    given |= {"allocated": draw(st.sampled_from(["DEFAULT", "EARLY", "LATE", "INCR"]))}
    given |= {"whole_edges": draw(st.booleans()), "unfiltered": draw(st.integers(0, 4)) == 0}
    if free:
        # Which axes grow without end decides how chunks are found in the later format.
        limits = [draw(st.sampled_from([None, max(size + 9, chunk)])) for size, chunk in zip(shape, chunks)]
        if filters is HDF5PLUGIN and None in limits:
            # One endless axis behind others would leave these chunks to h5py, which has no such filters here.
            limits[0] = None
        given |= {"maxshape": tuple(limits)}
        sizes = st.tuples(*(st.integers(1, size + 4) for size in shape))
        given |= {"steps": tuple(draw(st.lists(sizes, max_size=2)))}
    return given


@st.composite
def files(draw, filters):
    axis = draw(st.sampled_from([0, 0, 0, 1, -1]))
    rows = draw(st.one_of(st.integers(1, 20), st.integers(100, 200)))
    items = draw(st.lists(datasets(rows, axis, filters), min_size=1, max_size=10))
    file = File(
        tuple(items),
        libver=draw(st.sampled_from(["earliest", "latest"])),
        userblock=draw(st.sampled_from([0, 0, 512, 2048])),
        ordered=draw(st.booleans()),
    )
    return file, rows, axis


def ways(item, libver):
    """By which ways these bytes may be read."""
    names = {name for name, _ in item.filters}
    if item.layout not in ("contiguous", "chunked") or names & {"szip", "nbit", "scaleoffset"}:
        return "h5py"
    if item.layout == "contiguous":
        return "mmap" if item.written != "none" or item.allocated == "EARLY" else "h5py"
    endless = [place for place, limit in enumerate(item.maxshape or ()) if limit is None]
    if len(endless) == 1 and endless != [0] and (libver == "latest" or not item.whole_edges):
        # HDF5 2.0 names wrong places for these chunks, if there is more than one before them.
        before = zip(item.maxshape[: endless[0]], item.chunks)
        return "h5py" if any(limit > chunk for limit, chunk in before) else "direct or mmap"
    # Plain chunks are mapped if they are whole rows, and all there.
    return "direct" if names else "direct or mmap"


def check_same(ours, theirs, what):
    """The same numbers, bit for bit, in native byte order; compounds field for field."""
    if theirs.dtype.names:
        assert list(ours) == list(theirs.dtype.names), what
        for name in theirs.dtype.names:
            check_same(ours[name], theirs[name], (what, name))
        return
    native = np.array(theirs, theirs.dtype.newbyteorder("="), order="C")
    got = ours.numpy()
    assert (got.shape, got.dtype) == (native.shape, native.dtype), what
    if got.tobytes() != native.tobytes():
        wrong = np.argwhere(got.reshape(-1).view(f"V{got.itemsize}") != native.reshape(-1).view(f"V{got.itemsize}"))
        raise AssertionError(f"{len(wrong)} of {got.size} elements differ, the first at {wrong[0]}: {what}")


def check_file(path, theirs, described, rows, axis, options, draw):
    with hdf5(path, datasets=[*theirs], **options) as source:
        facts = source.explain().facts
        assert len(source) == rows
        for indices in (np.arange(rows), np.arange(rows)[::-1].copy(), *draw):
            taken = source.take(indices, 0)
            for name, item in zip(theirs, described.datasets):
                check_same(taken[name], np.moveaxis(theirs[name], axis, 0)[indices], (item, facts[name]))
        for place in (0, rows // 2, rows - 1):
            element = source(place)
            for name, item in zip(theirs, described.datasets):
                check_same(element[name], np.moveaxis(theirs[name], axis, 0)[place], (item, facts[name]))
            tree.map(lambda leaf: leaf.zero_(), element)
        check_same(source(0)["0"], np.moveaxis(theirs["0"], axis, 0)[0], "what is done to an element came back")
        size = max(1, rows // 3)
        batch = source.batch(size)(1 if rows > size else 0)
        part = slice(size, 2 * size) if rows > size else slice(0, size)
        for name, item in zip(theirs, described.datasets):
            check_same(batch[name], np.moveaxis(theirs[name], axis, 0)[part], (item, facts[name]))
        return facts


@st.composite
def readings(draw, rows):
    """How to read: threads, bytes for the cache (of less than one chunk, or of all), and which rows."""
    options = {"threads": draw(st.sampled_from([1, 3])), "memory": draw(st.sampled_from([1, 1000, "64 MiB"]))}
    places = st.lists(st.integers(0, rows - 1), min_size=1, max_size=40).map(lambda given: np.array(given, np.int64))
    return options, draw(st.lists(places, min_size=1, max_size=3))


def check_drawn(writer, path, drawn, data):
    described, rows, axis = drawn
    theirs = writer.write(path, described)
    options, places = data.draw(readings(rows))
    options |= {"axis": axis}
    facts = check_file(path, theirs, described, rows, axis, options, places)
    for name, item in zip(theirs, described.datasets):
        assert re.search(r", (mmap|direct|h5py): ", facts[name])[1] in ways(item, described.libver), item


@settings(max_examples=70)
@given(drawn=files(HDF5), data=st.data())
def test_every_combination_that_hdf5_itself_writes(tmp_path_factory, writer, drawn, data):
    check_drawn(writer, tmp_path_factory.getbasetemp() / "every.h5", drawn, data)


@settings(max_examples=40)
@given(drawn=files(HDF5PLUGIN), data=st.data())
def test_every_combination_that_hdf5plugin_writes(tmp_path_factory, writer, drawn, data):
    check_drawn(writer, tmp_path_factory.getbasetemp() / "plugin.h5", drawn, data)
