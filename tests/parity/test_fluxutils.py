"""Coming from FluxUtils.jl and HDF5Utils.jl: what they do with data, through the public names (the table is in README)."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import functrain as ft

N, T, F = 12, 10, 3
DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(N, T, F)).astype("f4"), DRAW.normal(size=(N, T, 1)).astype("f4")


# --- readmmap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 3, 4096])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "u1", "<c8"])
def test_readmmap_is_the_dataset_at_any_offset(tmp_path, dtype, before):
    array = (DRAW.normal(size=(7, 5)) * 50).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        if before:
            file["before"] = np.zeros(before, "u1")
        file["x"] = array
    mapped = ft.readmmap(tmp_path / "a.h5", "x")
    assert isinstance(mapped, np.memmap)
    assert mapped.dtype == array.dtype
    assert mapped.tobytes() == array.tobytes()


def test_readmmap_is_read_only_and_outlives_the_file(tmp_path):
    ft.h5write(tmp_path / "a.h5", {"x": X})
    mapped = ft.readmmap(tmp_path / "a.h5", "x")
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    # Nobody holds it open: it may be written to, and be taken away.
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["more"] = np.ones(3)
    os.unlink(tmp_path / "a.h5")
    assert np.array_equal(mapped, X)


def resident(path: Path) -> int:
    """The bytes of a file that this process has in memory through maps."""
    held, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            held += 1024 * int(line.split()[1])
    return held


def test_readmmap_touches_only_what_is_looked_at(tmp_path):
    path = tmp_path / "big.h5"
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        # 256 MiB, of which the disk holds none.
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2**16, 1024)), plist)
        file["x"][40_000] = 7
    mapped = ft.readmmap(path, "x")
    assert resident(path) == 0
    assert mapped[40_000].sum() == 7 * 1024
    assert 0 < resident(path) <= 2**22


def test_what_cannot_be_mapped_says_why_and_is_read_all_the_same(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("gzip", data=X, chunks=(4, T, F), compression="gzip")
        file.create_dataset("chunks", data=X, chunks=(4, T, F))
        file.create_dataset("blank", (N, T, F), "f4", fillvalue=2)
    for name, reason in {"gzip": "gzip", "chunks": "chunks", "blank": "not allocated"}.items():
        with pytest.raises(ft.DataError, match=rf"'{name}' in .* cannot be memory-mapped\. It is .*{reason}.*hdf5 reads it"):
            ft.readmmap(tmp_path / "a.h5", name)
    with ft.hdf5(tmp_path / "a.h5") as source:
        batch = source.batch(N)(0)
        assert np.array_equal(batch["gzip"], X)
        assert np.array_equal(batch["chunks"], X)
        assert (batch["blank"] == 2).all()


# --- sequences (F, N, T) of theirs, (N, T, F) of ours ----------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"chunks": (4, 5, 2), "compression": "gzip"}])
def test_sequences_as_julia_writes_them(tmp_path, layout):
    """An array (F, N, T) in column-major order is a dataset (T, N, F)."""
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("x", data=X.transpose(1, 0, 2), **layout)
        file["y"] = Y.transpose(1, 0, 2)
    with ft.hdf5(tmp_path / "data.h5", axis=1) as source:
        assert len(source) == N
        assert source(3)["x"].shape == (T, F)
        for batch, start in zip(source.batch(5), range(0, N, 5)):
            assert torch.equal(batch["x"], torch.from_numpy(X[start : start + 5]))
            assert torch.equal(batch["y"], torch.from_numpy(Y[start : start + 5]))


def test_minibatches_of_sequences_cut_into_windows(tmp_path):
    """Their iterator: batches of `batchsize` sequences, each in windows of `seqsize` steps, the last one shorter."""
    ft.h5write(tmp_path / "data.h5", {"x": X, "y": Y})
    with ft.hdf5(tmp_path / "data.h5") as source:
        seen = [
            (batch["x"][:, start : start + 4], batch["y"][:, start : start + 4])
            for batch in source.shuffle(seed=0).batch(5)
            for start in range(0, T, 4)
        ]
    assert [tuple(x.shape) for x, _ in seen[:3]] == [(5, 4, F), (5, 4, F), (5, 2, F)]
    assert sum(len(x) * x.shape[1] for x, _ in seen) == N * T
    assert np.isclose(sum(float(x.double().sum()) for x, _ in seen), X.sum(dtype="f8"))


def test_several_inputs_and_outputs_and_a_dummy_time_axis(tmp_path):
    static = DRAW.normal(size=(N, 4)).astype("f4")
    ft.h5write(tmp_path / "data.h5", {"inputs": {"series": X, "static": static}, "outputs": {"y": Y, "label": np.arange(N)}})
    with ft.hdf5(tmp_path / "data.h5", "inputs") as inputs, ft.hdf5(tmp_path / "data.h5", "outputs") as outputs:
        timed = inputs.map(lambda row: {**row, "static": row["static"][None]})
        (xs, ys) = timed.zip(outputs).batch(N)(0)
    assert xs["series"].shape == (N, T, F)
    assert np.array_equal(xs["static"], static[:, None])
    assert np.array_equal(ys["y"], Y)
    assert ys["label"].tolist() == list(range(N))


def test_one_long_series_in_windows(tmp_path):
    series = DRAW.normal(size=(50, F)).astype("f4")
    ft.h5write(tmp_path / "data.h5", {"x": series}, chunks=8, compression="gzip")
    with ft.hdf5(tmp_path / "data.h5", "x") as source:
        windows = source.windows(10, stride=5)
        assert windows.batch(2)(1).shape == (2, 10, F)
        assert np.array_equal(windows(3), series[15:25])


# --- h5concat --------------------------------------------------------------------------------------------------------


def parts(folder, arrays, **options):
    paths = [folder / f"part {n}.h5" for n in range(len(arrays))]
    for path, array in zip(paths, arrays):
        ft.h5write(path, {"deep": {"x": array}}, **options)
    return paths


def joined(path):
    with h5py.File(path) as file:
        return file["deep/x"][...]


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunks": 4, "compression": "gzip"}])
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_h5concat_joins_along_any_axis(tmp_path, axis, options, virtual):
    arrays = [np.take(X, range(n, X.shape[axis]), axis) for n in range(3)]
    ft.h5concat(tmp_path / "all.h5", parts(tmp_path, arrays, **options), axis, virtual=virtual)
    assert np.array_equal(joined(tmp_path / "all.h5"), np.concatenate(arrays, axis))
    with h5py.File(tmp_path / "all.h5") as file:
        assert file["deep/x"].is_virtual == virtual


@pytest.mark.parametrize("virtual", [False, True])
def test_h5concat_joins_lists_of_lists_along_two_axes(tmp_path, virtual):
    blocks = [[X[:5, :4], X[:5, 4:]], [X[5:, :4], X[5:, 4:]]]
    flat = parts(tmp_path, [block for row in blocks for block in row])
    ft.h5concat(tmp_path / "all.h5", [flat[:2], flat[2:]], axis=(0, -2), virtual=virtual)
    assert np.array_equal(joined(tmp_path / "all.h5"), X)


@pytest.mark.parametrize("options", [{}, {"chunks": 7}, {"chunks": 7, "compression": "gzip"}])
def test_h5concat_holds_no_more_than_its_memory(tmp_path, options):
    paths = parts(tmp_path, [np.full((400, 2560), n, "f8") for n in range(4)], **options)
    tracemalloc.start()
    ft.h5concat(tmp_path / "all.h5", paths, memory="1 MiB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # NumPy's memory: 32 MiB went through.
    assert peak < 3 * 2**20
    assert joined(tmp_path / "all.h5")[::400, 0].tolist() == [0, 1, 2, 3]


def test_h5concat_is_there_whole_or_not_at_all(tmp_path):
    paths = parts(tmp_path, [X, X, X])
    (tmp_path / "all.h5").write_text("old")
    seen = []

    def interrupted(done, total):
        seen.append((done, total))
        if done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft.h5concat(tmp_path / "all.h5", paths, overwrite=True, memory=200, progress=interrupted)
    assert seen[-1][0] < seen[-1][1] == 3 * X.nbytes
    assert (tmp_path / "all.h5").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["all.h5", *(path.name for path in paths)]


CLASHES = {
    "ragged shapes": [X, X[:, :4]],
    "ranks": [X, X[0]],
    "dtypes": [X, X.astype("f8")],
    "missing": [X, None],
}


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("clash", CLASHES)
def test_h5concat_refuses_what_does_not_fit(tmp_path, clash, virtual):
    """Theirs filled with zeros, without a word."""
    first, second = CLASHES[clash]
    paths = parts(tmp_path, [first, first if second is None else second])
    if second is None:
        ft.h5write(paths[1], {"deep": {"other": X}}, overwrite=True)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ft.DataError, match=r"'/deep/\w+' .*part"):
        ft.h5concat(tmp_path / "all.h5", paths, virtual=virtual)
    with pytest.raises(ft.DataError, match=r"no file '.*gone\.h5'"):
        ft.h5concat(tmp_path / "all.h5", [paths[0], tmp_path / "gone.h5"], virtual=virtual, fill=0)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("virtual", [False, True])
def test_h5concat_fills_where_it_is_told_to(tmp_path, virtual):
    paths = parts(tmp_path, [X, X[:5, :4], X])
    ft.h5write(paths[2], {"deep": {"other": X}}, overwrite=True)
    ft.h5concat(tmp_path / "all.h5", paths, fill=-1, virtual=virtual)
    expected = np.concatenate([X, np.pad(X[:5, :4], ((0, 0), (0, T - 4), (0, 0)), constant_values=-1)])
    found = joined(tmp_path / "all.h5")
    assert np.array_equal(found[: N + 5], expected)
    assert (found[N + 5 :] == -1).all()
    assert len(found) == 2 * N + 5
