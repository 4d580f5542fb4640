"""Datasets that may grow without end along one axis, of which HDF5 2.0 says wrongly where the chunks lie."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import functrain as ft
from functrain.core.errors import DataError
from functrain.data.h5.index import ChunkIndex, misplaced

SHAPES = ((20, 31), (10, 31), (20, 31, 13), (10, 20, 13))
CASES = [
    (shape, tuple(most))
    for shape in SHAPES
    for most in itertools.product(*[(size, 2 * size + 7, None) for size in shape])
    if None in most
]


def written(path: Path, shape: tuple[int, ...], maxshape: tuple[int | None, ...], libver: Any, **how: Any) -> np.ndarray:
    """A file of one dataset in chunks of 10, of which some are not written, as h5py reads it."""
    draw = np.random.default_rng(len(shape))
    with h5py.File(path, "w", libver=libver) as file:
        dataset = file.create_dataset("x", shape, "i4", chunks=(10,) * len(shape), maxshape=maxshape, **how)
        for place in np.ndindex(*(-(-size // 10) for size in shape)):
            if draw.random() < 0.6:
                region = tuple(slice(10 * number, min(10 * number + 10, size)) for number, size in zip(place, shape))
                dataset[region] = draw.integers(1, 1000, [part.stop - part.start for part in region])
    with h5py.File(path) as file:
        return file["x"][...]


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
def test_whatever_may_grow_the_numbers_are_h5py_s(tmp_path: Path, libver: str) -> None:
    for number, (shape, maxshape) in enumerate(CASES):
        path = tmp_path / f"{number}.h5"
        array = written(path, shape, maxshape, libver, compression=(None, "gzip")[number % 2])
        for axis in range(len(shape)):
            with ft.hdf5(path, "x", axis=axis) as source:
                rows = np.stack([source(row).numpy() for row in (0, len(source) - 1)])
                every = source.batch(len(source))(0).numpy()
            expected = np.moveaxis(array, axis, 0)
            assert np.array_equal(rows, expected[[0, -1]]), (shape, maxshape, axis)
            assert np.array_equal(every, expected), (shape, maxshape, axis)
        text = f"functrain content 1\nint32\n{'×'.join(map(str, shape))}\n".encode()
        assert ft.content_hash(path, "x") == hashlib.sha256(text + array.tobytes()).hexdigest(), (shape, maxshape)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("axis", [0, 1])
def test_joined_files_hold_the_same_numbers(tmp_path: Path, libver: str, axis: int) -> None:
    for number, maxshape in enumerate(((20, None), (None, 30), (40, None), (20, None, 13), (20, 30, None), (None, 30, 13))):
        shape = (20, 30, 13)[: len(maxshape)]
        paths = [tmp_path / f"{number}-{place}.h5" for place in range(2)]
        arrays = [written(path, shape, maxshape, libver, compression="gzip") for path in paths]
        ft.h5concat(tmp_path / f"{number}.h5", paths, axis=axis)
        with h5py.File(tmp_path / f"{number}.h5") as file:
            assert np.array_equal(file["x"][...], np.concatenate(arrays, axis)), (maxshape, axis)


def test_only_an_index_that_is_wrong_is_left_unused(tmp_path: Path) -> None:
    def way(maxshape: tuple[int | None, ...], libver: str) -> str:
        written(tmp_path / "a.h5", (20, 31), maxshape, libver, compression="gzip")
        with ft.hdf5(tmp_path / "a.h5", "x") as source:
            return "HDF5 misplaces chunks" if "HDF5 misplaces chunks" in str(source.explain()) else "direct"

    assert way((20, None), "latest") == way((90, None), "v110") == "HDF5 misplaces chunks"
    assert way((20, None), "earliest") == way((None, 31), "latest") == way((None, None), "latest") == "direct"
    # A copy keeps the index that it had, in whatever file.
    array = written(tmp_path / "old.h5", (20, 31), (20, None), "earliest", compression="gzip")
    with h5py.File(tmp_path / "old.h5") as old, h5py.File(tmp_path / "new.h5", "w", libver="latest") as new:
        old.copy("x", new)
        new["y"] = 0
    with ft.hdf5(tmp_path / "new.h5", "x") as source:
        assert np.array_equal(source.batch(20)(0).numpy(), array)


def test_a_wrong_index_cannot_be_made(tmp_path: Path) -> None:
    written(tmp_path / "a.h5", (20, 31), (20, None), "latest")
    with h5py.File(tmp_path / "a.h5") as file:
        assert misplaced(file["x"]) is not None
        with pytest.raises(DataError, match="only axis 1 is unlimited"):
            ChunkIndex.of(file["x"])
