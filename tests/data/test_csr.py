"""Rows of sparse matrices: as anndata and SciPy have them, 10x Genomics' files, and damaged ones."""

import importlib.util
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError, DataError
from functrain.data import csr, hdf5
from functrain.data.laws import check_prefetch, check_source

ANNDATA = """
import sys
import anndata
import numpy as np
import scipy.sparse

matrix = scipy.sparse.random(30, 12, 0.2, format="csr", dtype="f4", random_state=0)
counts = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(0.3, (30, 12)))
data = anndata.AnnData(matrix, layers={"counts": counts, "columns": matrix.tocsc()})
data.obs["kind"] = ["a", "b", "c"] * 10
data.obs["size"] = np.arange(30)
data.strings_to_categoricals()
for compression in (None, "gzip", "lzf"):
    data.write_h5ad(f"{sys.argv[1]}/{compression}.h5ad", compression=compression)
np.savez(sys.argv[1] + "/read.npz", x=matrix.toarray(), counts=counts.toarray())
"""


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory):
    if importlib.util.find_spec("anndata") is None:
        pytest.skip("anndata is not installed")
    folder = tmp_path_factory.mktemp("anndata")
    # In a process of its own: what it imports may bring another HDF5 library.
    subprocess.run([sys.executable, "-W", "ignore", "-c", ANNDATA, str(folder)], check=True)
    return folder


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_rows_are_those_of_anndata(h5ad, compression):
    path = h5ad / f"{compression}.h5ad"
    with np.load(h5ad / "read.npz") as saved:
        read = dict(saved)
    with csr(path, "X", threads=2) as source, hdf5(path, "obs", datasets=["size", "kind/codes"]) as obs:
        assert np.array_equal(source.batch(30)(0), read["x"])
        assert source(3).dtype == torch.float32
        order = np.random.default_rng(1).integers(0, 30, 50)
        assert np.array_equal(source.take(order, 0), read["x"][order])
        check_source(source)
        check_prefetch(source.shuffle(seed=0).batch(7))
        row, labels = source.zip(obs).shuffle(seed=0).batch(8)(1)
        assert np.array_equal(row, read["x"][labels["size"]])
        assert labels["kind/codes"].tolist() == (labels["size"] % 3).tolist()
        assert f"{np.count_nonzero(read['x'])} numbers of 30 × 12" in str(source.explain())
    with csr(path, "layers/counts") as counts:
        assert np.array_equal(counts.batch(30)(0), read["counts"])
        assert counts(0).dtype == torch.int64
    with pytest.raises(DataError, match=r"stored by columns \(csc_matrix\).*tocsr"):
        csr(path, "layers/columns")


def write(path, data, indices, indptr, shape=None, kind="csr_matrix", group="X"):
    with h5py.File(path, "w") as file:
        target = file.create_group(group)
        for name, array in [("data", data), ("indices", indices), ("indptr", indptr)]:
            target[name] = array
        if shape is not None:
            target.attrs.update({"shape": shape, "encoding-type": kind})


def test_10x_files_have_a_row_for_each_cell(tmp_path):
    # Features × cells by columns.
    write(tmp_path / "a.h5", [5, 6, 7], [0, 2, 1], [0, 2, 2, 3, 3], group="matrix")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["matrix/shape"] = np.array([3, 4], "i4")
    with csr(tmp_path / "a.h5", "matrix") as source:
        assert source.batch(4)(0).tolist() == [[5, 0, 6], [0, 0, 0], [0, 7, 0], [0, 0, 0]]
        check_source(source)


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4", "u8", "i1", ">i2", "i8", "f2", ">f4", "f8", "c8"])
@pytest.mark.parametrize("index", ["i4", ">i8", "u2"])
def test_every_dtype_and_numbers_with_one_place(tmp_path, dtype, index):
    data = np.array([1, 1, 1, 1, 1]).astype(dtype)
    write(tmp_path / "a.h5", data, np.array([2, 0, 2, 1, 1], index), np.array([0, 3, 3, 5], index), (3, 3))
    with csr(tmp_path / "a.h5", "X") as source:
        batch = source.batch(3)(0)
    assert batch.numpy().dtype == np.dtype(dtype).newbyteorder("=")
    two = 1 if dtype == "?" else 2
    assert np.array_equal(batch, np.array([[1, 0, two], [0, 0, 0], [0, two, 0]]))


def test_indices_outside_the_matrix_name_the_row(tmp_path):
    for wrong in (3, -1):
        write(tmp_path / "a.h5", [1.0, 2.0, 3.0], [0, 1, wrong], [0, 1, 2, 3], (3, 3))
        with csr(tmp_path / "a.h5", "X") as source:
            assert source.batch(2)(0).tolist() == [[1, 0, 0], [0, 2, 0]]
            for read in (lambda: source(2), lambda: source.take(np.array([0, 2]), 0)):
                with pytest.raises(
                    DataError, match=rf"matrix 'X' in '.*' is damaged: row 2 has a number in column {wrong}, and"
                ):
                    read()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"indptr": [0, 2, 1, 3]}, "indptr of matrix 'X' .* is damaged: offsets must never fall"),
        ({"indptr": [0, 1, 2, 4]}, "must lie in 0 … 3"),
        ({"indptr": [0, 1, 3]}, r"3 rows and 3 columns, and an indptr of int64 and shape \(3,\)"),
        ({"indptr": [0.0, 1.0, 2.0, 3.0]}, "indptr of float64"),
        ({"indices": [0.0, 1.0, 2.0]}, "'X/indices' .* float64"),
        ({"indices": [0, 1]}, "differ in length"),
        ({"data": np.zeros((3, 2))}, r"'X/data' .* shape \(3, 2\)"),
        ({"shape": None}, "does not tell its shape"),
        ({"kind": b"csc_matrix"}, "by columns"),
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path, given, message):
    matrix = {"data": [1.0, 2.0, 3.0], "indices": [0, 1, 2], "indptr": [0, 1, 2, 3], "shape": (3, 3)}
    write(tmp_path / "a.h5", **{**matrix, **given})
    with pytest.raises(DataError, match=message):
        csr(tmp_path / "a.h5", "X")


def test_groups_that_hold_none_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"] = np.zeros((3, 3))
        file["half/data"] = np.zeros(3)
    for group, message in [("X", "no sparse matrix"), ("half", "for want of indices, indptr"), ("nowhere", "has no 'nowhere'")]:
        with pytest.raises(DataError, match=message):
            csr(tmp_path / "a.h5", group)
    with pytest.raises(ArgumentError, match="group takes"):
        csr(tmp_path / "a.h5", None)
    with pytest.raises(DataError, match="no file"):
        csr(tmp_path / "none.h5", "X")


def test_a_closed_matrix_is_read_no_more(tmp_path):
    write(tmp_path / "a.h5", [1.0], [0], [0, 1], (1, 1))
    with csr(tmp_path / "a.h5", "X") as source:
        again = source.refreshed()
    with pytest.raises(DataError, match="was closed"):
        source(0)
    assert again(0).tolist() == [1.0]
    again.close()
