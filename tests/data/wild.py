"""Files as other libraries write them: a program, as each of these brings a libhdf5 of its own."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
DRAW = np.random.default_rng(0)
FRAMES = (DRAW.integers(0, 40, (50, 8, 6)) // 30 * 7).astype("i4")


def pytables(path: str) -> Arrays:
    """Arrays by every compressor that there is, a growing array, a table, sequences."""
    import tables

    with tables.open_file(path, "w") as file:
        file.create_array("/", "array", FRAMES)
        file.create_array("/", "big", FRAMES.astype(">i4"))
        file.create_array("/", "flags", FRAMES > 0)
        libraries = ["zlib", "lzo", "bzip2", *(f"blosc:{name}" for name in tables.blosc_compressor_list())]
        for library in libraries:
            if tables.which_lib_version(library.partition(":")[0]) is None:
                continue
            ways: dict[str, dict[str, bool]] = {"": {}, "_fletcher32": {"fletcher32": True}}
            if library.startswith("blosc"):
                ways["_bits"] = {"shuffle": False, "bitshuffle": True}
            for name, more in ways.items():
                filters = tables.Filters(complevel=4, complib=library, **more)
                file.create_carray("/", library.replace(":", "_") + name, obj=FRAMES, filters=filters, chunkshape=(7, 8, 6))
        growing = file.create_earray("/", "growing", tables.Float32Atom(), (0, 5), chunkshape=(8, 5))
        for _ in range(5):
            growing.append(DRAW.normal(size=(10, 5)).astype("f4"))
        kind = np.dtype([("x", "<f4", (3,)), ("n", "u1"), ("name", "S8"), ("long", "<i8")])
        table = file.create_table("/", "table", kind, filters=tables.Filters(complevel=1), chunkshape=(9,))
        rows = np.zeros(50, kind)
        rows["x"], rows["n"], rows["long"] = DRAW.normal(size=(50, 3)), np.arange(50), 10**12 - np.arange(50)
        table.append(rows)
        sequences = file.create_vlarray("/", "sequences", tables.Int32Atom())
        for length in range(50):
            sequences.append(np.arange(length, dtype="i4") + 1000 * length)
        file.flush()
        read = {node.name: node[:] for node in file.walk_nodes("/", "Leaf") if node.name not in ("table", "sequences")}
        return {**read, "table/x": table.col("x"), "table/n": table.col("n"), "table/long": table.col("long")}


def netcdf(path: str) -> Arrays:
    """Variables with each of its filters, packed ones, groups, and a dimension without end."""
    import netCDF4

    read: Arrays = {}
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("time", None)
        file.createDimension("lat", 8)
        file.createDimension("lon", 6)
        box = ("time", "lat", "lon")
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "contiguous": {"dimensions": ("lat", "lon")},
            "deflate": {"zlib": True, "shuffle": False},
            "shuffled": {"zlib": True, "complevel": 9, "fletcher32": True, "chunksizes": (7, 8, 5)},
            "big": {"endian": "big", "zlib": True},
        }
        supported = {"zstd": "zstandard", "bzip2": "bzip2", "szip": "szip", "blosc_lz4": "blosc", "blosc_zstd": "blosc"}
        for name, feature in supported.items():
            if getattr(netCDF4, f"__has_{feature}_support__", False):
                ways[name] = {"compression": name, "chunksizes": (7, 8, 6)}
        for name, given in ways.items():
            options = {"dimensions": box, **given}
            variable = file.createVariable(name, ">i4" if name == "big" else "i4", **options)
            variable[:] = FRAMES if options["dimensions"] == box else FRAMES[0]
        file.createVariable("time", "f8", ("time",))[:] = np.arange(50) / 2
        packed = file.createVariable("deep/packed", "i2", box, zlib=True, fill_value=-999, chunksizes=(9, 8, 6))
        packed.scale_factor, packed.add_offset = np.float32(0.5), np.float32(10)
        packed[:] = np.ma.masked_equal(FRAMES * 0.5 + 10, 10.0)
    with netCDF4.Dataset(path) as file:
        for name in [*ways, "time"]:
            read[name] = file[name][...].data
        masked = file["deep/packed"][...]
        read["deep/packed unpacked"] = masked.astype("f4").filled(np.nan)
        file["deep/packed"].set_auto_maskandscale(False)
        read["deep/packed"] = file["deep/packed"][...]
    return read


def anndata(path: str) -> Arrays:
    """Cells by genes, dense and as a sparse matrix."""
    warnings.simplefilter("ignore")
    import anndata as ad
    import pandas
    import scipy.sparse as sp

    dense = FRAMES.reshape(50, 48).astype("f4")
    kinds = pandas.Categorical(["a", "b"] * 25)
    obs = pandas.DataFrame({"size": dense.sum(1), "kind": kinds}, index=[f"cell {n}" for n in range(50)])
    cells = ad.AnnData(X=dense, obs=obs, layers={"sparse": sp.csr_matrix(dense)}, obsm={"umap": DRAW.normal(size=(50, 2))})
    cells.write_h5ad(path, compression="gzip")
    again = ad.read_h5ad(path)
    return {
        "X": np.asarray(again.X),
        "layers/sparse": again.layers["sparse"].toarray(),
        "obsm/umap": np.asarray(again.obsm["umap"]),
        "obs/size": again.obs["size"].to_numpy(),
        "obs/kind/codes": again.obs["kind"].cat.codes.to_numpy(),
    }


if __name__ == "__main__":
    kind, target = sys.argv[1:]
    found = {"pytables": pytables, "netcdf": netcdf, "anndata": anndata}[kind](target)
    np.savez(f"{target}.npz", **{name.replace("/", "|"): array for name, array in found.items()})
