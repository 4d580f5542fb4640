"""Damaged HDF5 files: whatever was cut off or overwritten, reading is right or a DataError, and never a crash."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from functrain.core.errors import DataError
from functrain.data import h5concat, hdf5, readmmap

COUNT = 350
X, Y = np.arange(60.0).reshape(20, 3), np.arange(20)


def shelf(path, libver):
    with h5py.File(path, "w", libver=libver) as file:
        file["t/x"] = X
        file.create_dataset("t/y", data=Y, chunks=(4,), compression="gzip", shuffle=True, fletcher32=True)
        file["t"].attrs["note"] = np.bytes_("text")
        file["t/y"].attrs["scale"] = np.float32(0.5)


# In a process of its own, which a crash of HDF5 would end.
READER = """
import random, resource, sys, warnings
import numpy as np
from functrain.core.errors import DataError
from functrain.data import h5concat, hdf5, readmmap

path, checked, seed, count = sys.argv[1], sys.argv[2] == "latest", int(sys.argv[3]), int(sys.argv[4])
with open(path, "rb") as file:
    whole = file.read()
draw = random.Random(seed)
# A damaged shape may claim terabytes: neither memory nor disk are to hold them.
resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
outcomes = {"read": 0, "refused": 0}

def damaged():
    if draw.random() < 0.2:
        return whole[: draw.randrange(len(whole))]
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 3, 10])):
        # Most of the file is padding behind the first bytes and before the last.
        data[draw.choice(places)] = draw.choice([0, 255, draw.randrange(256)])
    return bytes(data)

def attempt(read, *arguments):
    try:
        result = read(*arguments)
    except DataError as error:
        assert str(error).count(".h5"), error
        outcomes["refused"] += 1
        return
    outcomes["read"] += 1
    # Later versions of the format have a checksum over all but the bytes of x.
    if checked and result is not None:
        assert np.array_equal(result, np.arange(20)), result

def first_twenty(group, datasets):
    with hdf5(path, group, datasets=datasets) as source:
        batch = source.take(np.arange(20)[: len(source)], 0)
        source(len(source) - 1)
        y = batch if group == "t/y" else batch.get("y")
        return None if y is None else y.numpy()

places = [place for place, byte in enumerate(whole) if byte] + list(range(0, len(whole), 7))
for number in range(count):
    print(number, file=sys.stderr, flush=True)
    with open(path, "wb") as file:
        file.write(damaged())
    attempt(first_twenty, "t", None)
    attempt(first_twenty, "t/y", None)
    attempt(first_twenty, "t", ["x"])
    attempt(lambda: readmmap(path, "t/x").sum() and None)
    attempt(h5concat, path + ".all.h5", [path])
    attempt(lambda: h5concat(path + ".all.h5", [path] * 2, overwrite=True))
print(outcomes)
assert min(outcomes.values()) > count / 2, outcomes
"""


def test_a_group_that_cannot_be_listed_is_named(tmp_path):
    path = tmp_path / "a.h5"
    shelf(path, "earliest")
    root, group = path.read_bytes().split(b"TREE\0", 2)[:2]
    with open(path, "r+b") as file:
        file.seek(len(root) + 5 + len(group))
        file.write(b"LOST")
    for read in (lambda: readmmap(path, "t"), lambda: hdf5(path, datasets=["t"]), lambda: hdf5(path, "t")):
        with pytest.raises(DataError, match=r"'t' in .*a\.h5.* cannot be "):
            read()


def test_a_chunk_of_no_bytes_is_refused_before_hdf5_crashes_on_it(tmp_path):
    path = tmp_path / "a.h5"
    shelf(path, "earliest")
    with h5py.File(path) as file:
        chunk = file["t/y"].id.get_chunk_info(2)
    whole = bytearray(path.read_bytes())
    # An entry of the index: the size, the mask of filters, and the offset along each axis.
    entry = bytes([*chunk.size.to_bytes(4, "little"), *bytes(4), *(8).to_bytes(8, "little")])
    assert whole.count(entry) == 1
    whole[whole.index(entry)] = 0
    path.write_bytes(whole)
    for read in (lambda: hdf5(path, "t"), lambda: h5concat(tmp_path / "all.h5", [path])):
        with pytest.raises(DataError, match=r"'/t/y' in .* its chunk at \(8,\) has no bytes"):
            read()


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_damaged_file_is_read_right_or_refused(tmp_path, libver):
    shelf(tmp_path / "a.h5", libver)
    command = [sys.executable, "-W", "error", "-c", READER, str(tmp_path / "a.h5"), libver, "1", str(COUNT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
