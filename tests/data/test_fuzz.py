"""Thousands of damaged files: read right or refused, never a crash, and never other numbers where a checksum covers them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from h5files import Dataset, File, writing

SHUFFLE, GZIP, FLETCHER = ("shuffle", ()), ("deflate", (4,)), ("fletcher32", ())
# What checksums cover whole, in the later format.
COVERED = {
    "gzip": (GZIP,),
    "shuffle gzip fletcher": (SHUFFLE, GZIP, FLETCHER),
    "fletcher": (FLETCHER,),
    "lzf fletcher": (("lzf", ()), FLETCHER),
    "zstd fletcher": (("zstd", (3,)), FLETCHER),
}
OPEN = {
    "plain": (),
    "lzf": (("lzf", ()),),
    "shuffle lzf": (SHUFFLE, ("lzf", ())),
    "zstd": (("zstd", (3,)),),
    "lz4": (("lz4", (64,)),),
    "blosc": (("blosc", (0, 0, 0, 0, 5, 1, 1)),),
    "blosc zstd": (("blosc", (0, 0, 0, 0, 5, 2, 5)),),
    "bitshuffle lz4": (("bitshuffle", (0, 2)),),
    "bitshuffle zstd": (("bitshuffle", (0, 3)),),
    "szip": (("szip", (32, 4)),),
    "scaleoffset": (("scaleoffset", (2, 0)),),
    "nbit": (("nbit", ()),),
}
# Other layouts, and, in the later format, the other kinds of index: by array, by tree, of one chunk, of none. Sequences and
# virtual datasets are left out: HDF5 2.0 itself never ends, or dies, on some damage to the heap that holds their parts.
LAYOUTS = {
    "contiguous": {"dtype": ">f8", "content": "noise"},
    "compact": {"layout": "compact"},
    "compound": {"layout": "chunked", "dtype": "nested", "chunks": (8, 9), "filters": (GZIP,)},
    "by array, chunks file": {"maxshape": (None, 9), "layout": "chunked", "chunks": (4, 5), "filters": (SHUFFLE, GZIP)},
    "by tree, chunks file": {"maxshape": (None, None), "layout": "chunked", "chunks": (4, 5), "filters": (GZIP, FLETCHER)},
    "second axis, chunks file": {"maxshape": (30, None), "layout": "chunked", "chunks": (4, 5), "filters": (GZIP,)},
    "one, chunks file": {"layout": "chunked", "chunks": (23, 9), "filters": (GZIP, FLETCHER)},
    "none": {"layout": "chunked", "chunks": (4, 5), "allocated": "EARLY"},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of small files for each version of the format."""
    folders = {}
    with writing() as writer:
        for libver in ("earliest", "latest"):
            folders[libver] = tmp_path_factory.mktemp(libver)
            # The later format has checksums over all that is no data.
            covers = "chunks file" if libver == "latest" else "chunks"
            for name, filters in [*COVERED.items(), *OPEN.items()]:
                item = Dataset((23, 9), "<i4", "chunked", (8, 9), filters=filters, content="levels")
                called = f"{name}, {covers}" if name in COVERED else name
                writer.write(folders[libver] / f"{called}.h5", File((item,), libver=libver))
            for name, given in LAYOUTS.items():
                item = Dataset(**{"shape": (23, 9), "dtype": "<i4", "content": "levels", **given})
                called = name if libver == "latest" else name.replace(" file", "")
                writer.write(folders[libver] / f"{called}.h5", File((item,), libver=libver))
    return folders


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_damage_is_found_or_harmless(originals, libver):
    script = Path(__file__).with_name("fuzzing.py")
    command = [sys.executable, "-W", "error", "-W", "ignore:dataset:RuntimeWarning", str(script)]
    command += [str(originals[libver]), "1", "1500", "12"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout)
    for name, counted in outcomes.items():
        assert counted.get("refused", 0), f"no damage to {name!r} was noticed: {counted}"
    total = {kind: sum(counted.get(kind, 0) for counted in outcomes.values()) for kind in ("read", "refused")}
    assert min(total.values()) > sum(total.values()) / 10, total
