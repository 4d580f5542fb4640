"""Packed numbers: read as netCDF4-python reads them, which writes and reads the same file in a process of its own."""

import importlib.util
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from functrain.core.errors import DataError
from functrain.data import hdf5
from functrain.data.laws import check_source

# What is written and how netCDF4 reads it: masked numbers as NaN.
NETCDF = """
import sys
import netCDF4
import numpy as np

f4, n = np.float32, 20
rng = np.random.default_rng(0)
with netCDF4.Dataset(sys.argv[1], "w") as file:
    file.createDimension("time", n)
    file.createDimension("place", 3)

    def variable(name, dtype, fill=None, keywords={}, **attributes):
        made = file.createVariable(name, dtype, ("time", "place"), fill_value=fill, **keywords)
        made.set_auto_maskandscale(False)
        made.setncatts(attributes)
        kind = np.dtype(dtype)
        least, most = (-1000, 1000) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
        stored = rng.integers(max(least, -1000), min(most, 1000), (n, 3)).astype(kind)
        if fill is not None:
            stored[7] = fill
        for place, value in enumerate(np.ravel(attributes.get("missing_value", ()))):
            stored[9 + place] = value
        made[:] = stored

    variable("short_f4", "i2", -999, scale_factor=f4(0.01), add_offset=f4(273.15))
    variable("short_f8", "i2", -999, scale_factor=0.01, add_offset=273.15)
    variable("byte_f4", "u1", 255, scale_factor=f4(0.5))
    variable("unsigned", "i1", None, scale_factor=f4(0.5), _Unsigned="true")
    variable("unsigned_fill", "i2", -2, scale_factor=f4(0.5), _Unsigned="true")
    variable("offset", "i4", None, add_offset=f4(3))
    variable("missing_i8", "i8", None, missing_value=np.int64(5))
    variable("fill_only", "i2", -5)
    variable("missing_f4", "f4", None, missing_value=f4(-9999))
    variable("missing_two", "f4", f4(1e20), missing_value=np.array([-9999, -8888], f4))
    variable("fill_nan", "f8", np.nan, scale_factor=2.0)
    variable("plain", "f4")
    variable("bounds", "i2", None, valid_min=np.int16(-500), valid_max=np.int16(500), scale_factor=0.1)
    variable("range", "u2", None, valid_range=np.array([10, 700], "u2"), scale_factor=f4(0.1))
    variable("big", ">i2", -7, {"endian": "big"}, scale_factor=f4(2))
    variable("zipped", "i2", -7, {"zlib": True, "shuffle": True, "fletcher32": True, "chunksizes": (7, 3)}, scale_factor=f4(2))
    half = file.createVariable("half", "f4", ("time", "place"))
    half[: n // 2] = 1
    half = file.createVariable("half_packed", "i2", ("time", "place"))
    half.setncatts({"scale_factor": 0.5})
    half[: n // 2] = 1
    file.createVariable("count", "i4", ("time",))[:] = np.arange(n)
with netCDF4.Dataset(sys.argv[1]) as file:
    read = {name: variable[:] for name, variable in file.variables.items()}
    floats = {name: array.astype(array.dtype if array.dtype.kind == "f" else "f8") for name, array in read.items()}
    np.savez(sys.argv[2], **{name: np.ma.filled(array, np.nan) for name, array in floats.items()})
"""


@pytest.fixture(scope="module")
def netcdf(tmp_path_factory):
    if importlib.util.find_spec("netCDF4") is None:
        pytest.skip("netCDF4 is not installed")
    folder = tmp_path_factory.mktemp("netcdf")
    # In a process of its own: its HDF5 library is another than h5py's.
    command = [sys.executable, "-W", "ignore", "-c", NETCDF, str(folder / "a.nc"), str(folder / "read.npz")]
    subprocess.run(command, check=True)
    return folder / "a.nc", dict(np.load(folder / "read.npz"))


def test_packed_numbers_are_those_that_netcdf_reads(netcdf):
    path, theirs = netcdf
    with hdf5(path, unpack=True) as source:
        batch = source.batch(len(source))(0)
        # Dimensions without a variable are no data.
        assert sorted(batch) == sorted(theirs)
        for name, leaf in batch.items():
            assert np.array_equal(leaf.numpy(), theirs[name], equal_nan=leaf.is_floating_point()), name
            if name not in ("count", "missing_i8", "fill_only"):
                assert leaf.numpy().dtype == theirs[name].dtype, name
        assert batch["count"].dtype == torch.int32
        assert (batch["missing_i8"].dtype, batch["fill_only"].dtype) == (torch.float64, torch.float32)
        assert sum(int(leaf.isnan().sum()) for leaf in batch.values() if leaf.is_floating_point()) > 100
        text = str(source.explain())
        assert "unpacked to float32: · 0.01, + 273.15, NaN for -999" in text
        assert "NaN below -500, NaN above 500" in text
    with hdf5(path, datasets=["zipped", "bounds"], unpack=True) as few:
        check_source(few)


def test_packed_numbers_come_as_they_are_stored_unless_asked(netcdf):
    path, _ = netcdf
    with h5py.File(path) as file, hdf5(path, datasets=["short_f4", "plain"]) as source:
        batch = source.batch(len(source))(0)
        assert np.array_equal(batch["short_f4"], file["short_f4"][...])
        assert np.array_equal(batch["plain"], file["plain"][...])
        lines = [line for line in str(source.explain()).splitlines() if "unpack=True" in line]
        assert len(lines) == 1
        assert "short_f4" in lines[0]


def test_attributes_of_other_kinds(tmp_path):
    path = tmp_path / "a.h5"
    stored = np.array([-9999, -1, 0, 1, 300], "i2")
    with h5py.File(path, "w") as file:
        file["x"] = stored
        # A float where the data are ints, one that no int16 is, and bounds that no int16 reaches.
        file["x"].attrs.update({"_FillValue": -9999.0, "missing_value": [0.5, 1e9], "valid_min": -1e6, "scale_factor": 2})
        file["words"] = np.zeros(5)
        file["words"].attrs["scale_factor"] = "0.5"
        file["range"] = np.zeros(5)
        file["range"].attrs["valid_range"] = [1, 2, 3]
    with hdf5(path, "x", unpack=True) as source:
        assert source.batch(5)(0).dtype == torch.float32
        assert np.array_equal(source.batch(5)(0), [np.nan, -2, 0, 2, 600], equal_nan=True)
    for name, message in [("words", "attribute scale_factor that is no number: '0.5'"), ("range", "valid_range of 3 numbers")]:
        with pytest.raises(DataError, match=f"dataset '{name}' in '.*' has .*{message}|{message}"):
            hdf5(path, name, unpack=True)
        assert hdf5(path, name).batch(5)(0).tolist() == [0] * 5
