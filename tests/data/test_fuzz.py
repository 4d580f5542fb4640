"""Thousands of damaged files: read right or refused, never a crash, and never other numbers where a checksum covers them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from h5files import Dataset, File, writing

SHUFFLE, GZIP, FLETCHER = ("shuffle", ()), ("deflate", (4,)), ("fletcher32", ())
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
            writer.write(folders[libver] / "contiguous.h5", File((Dataset((23, 9), ">f8", content="noise"),), libver=libver))
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
