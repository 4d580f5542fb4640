"""Decoding chunks outside HDF5: what h5py reads, whatever the filters, the dtype and the damage."""

import json
import pickle
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import hdf5plugin  # noqa: F401 (registers its filters with h5py)
import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain.core.errors import DataError
from functrain.data.h5.checksum import fletcher32
from functrain.data.h5.chunked import _held
from functrain.data.h5.filters import DecodeError, Filter, Pipeline, ShortError, names
from functrain.data.h5.scratch import RAW, scratch

GZIP, SHUFFLE, FLETCHER32, LZF, ZSTD = (1, (4,)), (2, ()), (3, ()), (32000, ()), (32015, (3,))
LZ4, LZ4_BLOCKS = (32004, (0,)), (32004, (1000,))
BLOSC = [(32001, (0, 0, 0, 0, 5, shuffle, codec)) for shuffle in (0, 1, 2) for codec in (0, 1, 4, 5)]
BITSHUFFLE, BITSHUFFLE_LZ4, BITSHUFFLE_ZSTD = (32008, (0, 0)), (32008, (0, 2)), (32008, (64, 3, 3))
CODECS = [LZF, ZSTD, LZ4, LZ4_BLOCKS, BITSHUFFLE_LZ4, BITSHUFFLE_ZSTD, *BLOSC]
DTYPES = ["u1", "<i2", ">f4", "<f8", "<c16", [("a", "u1"), ("b", "<u2")], [("a", "<f4"), ("b", "u1", (3,))], "S100"]

PACKAGES = [frozenset(), frozenset({"imagecodecs"}), frozenset({"zlib_into"}), frozenset({"imagecodecs", "zlib_into"})]


class Written:
    """A dataset of one chunk, as h5py writes and reads it through the filters (code, parameters)."""

    def __init__(self, values, filters, raw=None, mask=0):
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(values.shape)
        for code, parameters in filters:
            plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, parameters)
        kind, shape = h5py.h5t.py_create(values.dtype, logical=True), h5py.h5s.create_simple(values.shape)
        self.size = values.nbytes
        with h5py.File.in_memory() as file:
            dataset = h5py.Dataset(h5py.h5d.create(file.id, b"x", kind, shape, plist))
            if raw is None:
                dataset[...] = values
            else:
                dataset.id.write_direct_chunk((0,), raw, mask)
            file.flush()
            self.pipeline = Pipeline.of(dataset)
            self.mask, self.raw = dataset.id.read_direct_chunk((0,))
            self._image = file.id.get_file_image()

    def read(self):
        # HDF5 itself still holds the chunk as it was before a direct write: only another file sees it.
        with h5py.File.in_memory(self._image) as file:
            return file["x"][...].tobytes()


def decoded(pipeline, raw, mask, size):
    out = np.full(size, 0xAA, np.uint8)
    pipeline.decode(raw, mask, out)
    return out.tobytes()


def some(dtype, count, letters, seed=0):
    dtype = np.dtype(dtype)
    return np.random.default_rng(seed).integers(0, letters, count * dtype.itemsize).astype(np.uint8).view(dtype)


@st.composite
def stacks(draw):
    # HDF5 gives parameters to one filter of a kind only.
    sizes = draw(st.lists(st.sampled_from([SHUFFLE, BITSHUFFLE]), unique=True))
    sums = draw(st.lists(st.just(FLETCHER32), max_size=2))
    codecs = draw(st.lists(st.sampled_from([GZIP, *CODECS]), max_size=1))
    if any(code == 32008 for code, _ in codecs):
        sizes = [each for each in sizes if each is SHUFFLE]
    return draw(st.permutations(sizes + sums + codecs))


@settings(max_examples=150, deadline=None)
@given(stacks(), st.sampled_from(DTYPES), st.integers(1, 1500), st.sampled_from([2, 16, 256]), st.sampled_from(PACKAGES))
def test_gives_what_h5py_reads(stack, dtype, count, letters, packages):
    written = Written(some(dtype, count, letters), stack)
    pipeline = Pipeline(written.pipeline.filters, packages)
    if "imagecodecs" not in packages and any(code > 4 for code, _ in stack):
        assert "functrain[codecs]" in pipeline.hindrance
    else:
        assert pipeline.hindrance is None
        assert decoded(pipeline, written.raw, written.mask, written.size) == written.read()


@pytest.mark.parametrize("letters", [8, 256])
@pytest.mark.parametrize("codec", [None, GZIP, *CODECS], ids=str)
def test_gives_what_h5py_reads_of_large_chunks(codec, letters):
    for dtype, count in (("<f4", 100_003), (DTYPES[-2], 40_001)):
        written = Written(some(dtype, count, letters), [SHUFFLE, *([codec] if codec else []), FLETCHER32])
        for packages in PACKAGES:
            pipeline = Pipeline(written.pipeline.filters, packages)
            if pipeline.hindrance is None:
                assert decoded(pipeline, written.raw, written.mask, written.size) == written.read()
        assert pipeline.hindrance is None


@pytest.mark.parametrize("mask", range(8))
def test_skips_the_filters_in_the_mask(mask):
    values, stack = some("<i4", 1000, 8), [SHUFFLE, GZIP, FLETCHER32]
    part = Written(values, [filter for place, filter in enumerate(stack) if not mask >> place & 1])
    whole = Written(values, stack, part.raw, mask)
    assert whole.read() == values.tobytes()
    # HDF5 minds no bit beyond the filters.
    for bits in (mask, mask | 0xFFFFFFF0):
        assert decoded(whole.pipeline, memoryview(part.raw), bits, part.size) == values.tobytes()


def test_lzf_that_saves_nothing_is_skipped():
    written = Written(some("u1", 5000, 256), [SHUFFLE, LZF])
    assert written.mask == 0b10
    assert decoded(written.pipeline, written.raw, written.mask, 5000) == written.read()


def test_no_filter_and_names():
    with h5py.File.in_memory() as file:
        plain = Pipeline.of(file.create_dataset("plain", (6,), "u1", chunks=(6,)))
        gzip = Pipeline.of(file.create_dataset("gzip", (6,), "f4", chunks=(6,), compression="gzip", shuffle=True))
    assert plain.plain
    assert str(plain) == "no filter"
    assert decoded(plain, b"abcdef", 0, 6) == b"abcdef"
    assert not gzip.plain
    assert str(gzip) == "shuffle+gzip"
    assert gzip.filters == (Filter(2, "shuffle", (4,)), Filter(1, "gzip", (4,)))
    assert str(Pipeline([Filter(40000, "mine", ())])) == "filter 40000"
    assert names[32015] == "zstd"
    again = pickle.loads(pickle.dumps(gzip))
    assert (again.filters, str(again)) == (gzip.filters, "shuffle+gzip")


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ([(40000, ())], ["filter 40000", "not registered"]),
        ([(32013, ())], ["zfp", "pip install hdf5plugin"]),
        ([(32026, ())], ["blosc2", "left to h5py"]),
        ([(305, ())], ["lzo", "pip install tables"]),
        ([(4, ())], ["szip", "left to h5py"]),
        ([(6, ())], ["scaleoffset", "left to h5py"]),
        ([GZIP, GZIP], ["gzip+gzip", "twice"]),
        ([LZF, (2, (4,)), GZIP], ["lzf+shuffle+gzip", "twice"]),
        ([(2, ())], ["shuffle", "()"]),
        ([(2, (0,))], ["shuffle", "(0,)"]),
        ([(32008, (0, 4))], ["bitshuffle", "(0, 4)"]),
        ([(32008, (0, 4, 4, 0, 9))], ["bitshuffle", "method 9"]),
    ],
)
def test_says_what_hinders(filters, words):
    pipeline = Pipeline([Filter(code, names.get(code, "mine"), values) for code, values in filters])
    assert all(word in pipeline.hindrance for word in words), pipeline.hindrance


def test_compressed_inside_a_checksum_before_another():
    # Two results in a row with a checksum between: neither may overwrite what it is made from.
    for stack in ([BITSHUFFLE, SHUFFLE, FLETCHER32, GZIP], [SHUFFLE, FLETCHER32, BITSHUFFLE, GZIP], [FLETCHER32, GZIP]):
        written = Written(some("<i4", 999, 8), stack)
        assert decoded(written.pipeline, written.raw, written.mask, written.size) == written.read()


def test_a_compressed_block_as_large_as_what_it_gives():
    # Such a block is taken for one that is not compressed in the lz4 filter, whose framing bitshuffle borrows.
    noise = some("u1", 8192, 256)
    blocks = (np.concatenate([noise[:size], np.zeros(8192 - size, np.uint8)]).tobytes() for size in range(8192))
    packed = next(packed for packed in map(imagecodecs.lz4_encode, blocks) if len(packed) == 8192)
    header = (8192 + 12).to_bytes(8, "big") + (8192).to_bytes(4, "big")
    raw = header + (8192).to_bytes(4, "big") + packed + bytes(range(12))
    written = Written(np.zeros(2051, "<i4"), [BITSHUFFLE_LZ4], raw)
    assert decoded(written.pipeline, raw, 0, 8204) == written.read()


# --- checksums -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9000), st.sampled_from([1, 2, 256]), st.integers(0, 5))
def test_checksum_is_the_one_in_the_file(size, letters, seed):
    raw = Written(some("u1", size, letters, seed), [FLETCHER32]).raw
    assert fletcher32(raw[:-4]) == int.from_bytes(raw[-4:], "little")


@pytest.mark.parametrize("size", [1, 2, 3, 720, 2048, 2049, 5001])
@pytest.mark.parametrize("byte", [0, 255])
def test_checksum_of_zeros_and_of_multiples_of_65535(byte, size):
    raw = Written(np.full(size, byte, np.uint8), [FLETCHER32]).raw
    assert fletcher32(raw[:-4]) == int.from_bytes(raw[-4:], "little")


def test_checksum_of_more_than_the_sums_hold():
    data = np.resize(some("u1", 999_983, 256), (1 << 27) + 4099)
    assert fletcher32(data.data) == imagecodecs.h5checksum_fletcher32(data)


def test_checksums_that_hdf5_takes():
    values = some("<i4", 100, 256)
    raw = Written(values, [FLETCHER32]).raw
    data, a, b, c, d = raw[:-4], *raw[-4:]
    for stored, taken in (((a, b, c, d), True), ((b, a, d, c), True), ((d, c, b, a), False), ((a, b, c, d ^ 1), False)):
        written = Written(values, [FLETCHER32], data + bytes(stored))
        if taken:
            assert written.read() == data
            assert decoded(written.pipeline, written.raw, 0, len(data)) == data
        else:
            with pytest.raises(OSError, match="filter returned failure"):
                written.read()
            with pytest.raises(DecodeError, match=r"checksum is 0x\w{8}, its data say 0x\w{8}"):
                decoded(written.pipeline, written.raw, 0, len(data))


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packages", PACKAGES, ids=sorted)
@pytest.mark.parametrize("stack", [[GZIP], [SHUFFLE, GZIP], [FLETCHER32], [SHUFFLE, GZIP, FLETCHER32]], ids=str)
def test_no_changed_byte_goes_unseen(stack, packages):
    values = some("<i4", 60, 4)
    written = Written(values, stack)
    pipeline = Pipeline(written.pipeline.filters, packages)
    seen = 0
    for place in range(len(written.raw)):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            raw = bytearray(written.raw)
            raw[place] ^= change
            try:
                result = decoded(pipeline, raw, 0, written.size)
            except DecodeError:
                seen += 1
                continue
            if result != values.tobytes():
                # Adler-32 is weak: of 1500 such changes, it misses one or two. HDF5 reads the same, or nothing.
                assert FLETCHER32 not in stack
                assert result == Written(values, stack, bytes(raw)).read()
    assert seen > 8 * len(written.raw)


def test_sizes_that_are_not_the_chunks():
    gzip, plain = Pipeline([Filter(1, "gzip", ())]), Pipeline([])
    for short in (lambda: decoded(gzip, zlib.compress(bytes(12)), 0, 4096), lambda: decoded(plain, bytes(12), 0, 4096)):
        with pytest.raises(ShortError, match="12 bytes, expected 4096"):
            short()
    with pytest.raises(DecodeError, match="5000 bytes, expected 4096"):
        decoded(plain, bytes(5000), 0, 4096)
    with pytest.raises(DecodeError, match="deflate data are damaged"):
        decoded(gzip, zlib.compress(bytes(5000)), 0, 4096)
    # What is behind the end of the stream, HDF5 ignores too.
    assert decoded(gzip, zlib.compress(bytes(4096)) + b"more", 0, 4096) == bytes(4096)


# In a process of its own, which a crash would end. The bytes and the result end where the memory does: to read or write
# behind them is a crash. The result must not depend on what was in memory before.
FUZZ = """
import ctypes, json, mmap, resource, sys
import numpy as np
from functrain.data.h5.filters import DecodeError, Filter, Pipeline
from functrain.data.h5.scratch import scratch

cases, count = json.load(sys.stdin)
page, room = mmap.PAGESIZE, 16 * mmap.PAGESIZE
keep, draw = [], np.random.default_rng(0)

def walled():
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + room), page, 0) == 0
    keep.append(memory)
    return np.frombuffer(memory, np.uint8, room)

def damaged(whole):
    kind = draw.integers(5)
    if kind == 0:
        return draw.bytes(draw.integers(len(whole) + 20))
    data = bytearray(whole)
    if kind == 1:
        return data[: draw.integers(len(data))]
    if kind == 2:
        return data + draw.bytes(draw.integers(1, 20))
    for _ in range(draw.choice([1, 1, 3])):
        # Headers are where sizes are.
        place = draw.integers(min(32, len(data))) if kind == 3 else draw.integers(len(data))
        data[place] = draw.choice([0, 255, draw.integers(256)])
    return data

def attempt(pipeline, raw, size, before):
    for slot in range(4):
        scratch.take(slot, 4 * size)[:] = before
    target[:] = before
    data = source[room - len(raw) :]
    data[:] = np.frombuffer(bytes(raw), np.uint8)
    try:
        pipeline.decode(data.data, 0, target[room - size :])
    except DecodeError as error:
        assert str(error)
        return None
    finally:
        assert (target[: room - size] == before).all(), "written before the start"
    return target[room - size :].tobytes()

source, target = walled(), walled()
for filters, raw, size in cases:
    whole = bytes.fromhex(raw)
    pipeline = Pipeline([Filter(code, str(code), tuple(values)) for code, values in filters])
    assert pipeline.hindrance is None, pipeline.hindrance
    assert attempt(pipeline, whole, size, 0) is not None
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * page
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
    refused = 0
    for _ in range(count):
        raw = damaged(whole)
        first, second = attempt(pipeline, raw, size, 0x55), attempt(pipeline, raw, size, 0xAA)
        assert first == second, (filters, raw, "depends on what was in memory")
        refused += first is None
    assert refused > count // 4, (filters, refused)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print("done")
"""


def test_damage_never_crashes_and_never_leaves_gaps():
    cases = []
    for codec in (GZIP, LZF, ZSTD, LZ4, LZ4_BLOCKS, BITSHUFFLE_LZ4, BITSHUFFLE_ZSTD, BITSHUFFLE, BLOSC[1], BLOSC[5], BLOSC[7]):
        written = Written(some("<i4", 1003, 4), [SHUFFLE, codec])
        filters = [(each.code, each.cd_values) for each in written.pipeline.filters]
        cases.append((filters, written.raw.hex(), written.size))
    command = [sys.executable, "-c", FUZZ]
    process = subprocess.run(command, input=json.dumps((cases, 120)), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]


# --- threads, memory -------------------------------------------------------------------------------------------------


def test_raw_bytes_may_lie_in_the_slot_for_them():
    for stack in ([BITSHUFFLE_LZ4], [BITSHUFFLE, SHUFFLE, FLETCHER32, GZIP], [BITSHUFFLE_ZSTD, SHUFFLE]):
        written = Written(some("<i4", 5000, 8), stack)
        raw = scratch.take(RAW, len(written.raw))
        raw[:] = np.frombuffer(written.raw, np.uint8)
        assert decoded(written.pipeline, raw.data, written.mask, written.size) == written.read()


@pytest.mark.parametrize("codec", [GZIP, BITSHUFFLE_LZ4], ids=str)
def test_threads_do_not_disturb_each_other(codec):
    all_written = [Written(some("<i4", 20_000 + 1000 * seed, 8, seed), [SHUFFLE, codec, FLETCHER32]) for seed in range(8)]
    pipeline = all_written[0].pipeline

    def check(turn):
        written = all_written[turn % 8]
        return decoded(pipeline, written.raw, written.mask, written.size)

    expected = [written.read() for written in all_written]
    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected[turn % 8] for turn, result in enumerate(pool.map(check, range(200))))


BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import functrain as ft, numpy as np
for name in ("gzip", "lzf"):
    with ft.hdf5({path!r}, name) as source:
        assert np.array_equal(source.batch(100)(0).numpy(), np.arange(100.0)), name
        print(source.explain())
"""


@pytest.mark.parametrize("packages", [("zlib_into",), ("imagecodecs", "zlib_into"), ("deflate", "imagecodecs", "zlib_into")])
def test_a_package_that_cannot_be_imported_is_done_without(tmp_path, packages):
    path, folder = tmp_path / "a.h5", tmp_path / "packages"
    with h5py.File(path, "w") as file:
        for name in ("gzip", "lzf"):
            file.create_dataset(name, data=np.arange(100.0), chunks=(9,), compression=name, shuffle=True)
    folder.mkdir()
    for name in packages:
        (folder / f"{name}.py").write_text("raise ImportError('libmissing.so: cannot open shared object file')")
    program = BROKEN.format(folder=str(folder), path=str(path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("libmissing.so") == len(packages) - 1


def test_a_filter_that_h5py_lacks_is_no_damage(tmp_path):
    for name, maxshape, libver in (("a", (20, 30), "earliest"), ("b", (20, None), "latest")):
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w", libver=libver) as file:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((10, 10))
            plist.set_filter(32100, h5py.h5z.FLAG_OPTIONAL, ())
            most = tuple(h5py.h5s.UNLIMITED if size is None else size for size in maxshape)
            kind, shape = h5py.h5t.py_create(np.dtype("f8")), h5py.h5s.create_simple((20, 30), most)
            dataset = h5py.Dataset(h5py.h5d.create(file.id, b"x", kind, shape, plist))
            dataset.id.write_direct_chunk((0, 0), bytes(800), 0)
        with ft.hdf5(path, "x") as source, pytest.raises(DataError, match="lacks the filter") as caught:
            source(0)
        assert "damaged" not in str(caught.value)


def test_bytes_between_fields_do_not_count(tmp_path):
    inner = np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [1, 8], "itemsize": 24})
    dtype = np.dtype({"names": ["p", "v"], "formats": [(inner, (2,)), ">i2"], "offsets": [3, 60], "itemsize": 64})
    held = np.zeros(64, np.bool_)
    held[[4, 28, 60, 61]] = held[11:19] = held[35:43] = True
    assert np.array_equal(_held(dtype), held)
    assert _held(np.dtype("S7")).all()
