"""The filters registered for HDF5, by number."""

from __future__ import annotations

names: dict[int, str] = {
    1: "gzip",
    2: "shuffle",
    3: "fletcher32",
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    305: "lzo",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32002: "mafisc",
    32003: "snappy",
    32004: "lz4",
    32005: "apax",
    32006: "cbf",
    32007: "jpeg-xr",
    32008: "bitshuffle",
    32009: "spdp",
    32010: "lpc-rice",
    32011: "ccsds-123",
    32012: "jpeg-ls",
    32013: "zfp",
    32014: "fpzip",
    32015: "zstd",
    32016: "b3d",
    32017: "sz",
    32018: "fcidecomp",
    32019: "jpeg",
    32020: "vbz",
    32021: "fapec",
    32022: "bitgroom",
    32023: "granular-bitround",
    32024: "sz3",
    32025: "delta-rice",
    32026: "blosc2",
    32027: "flac",
    32028: "sperr",
    32029: "terse",
    32030: "ffmpeg",
    32033: "htj2k",
}

# Which package brings a filter to h5py. The first six, and lzf, are in h5py itself.
_HDF5PLUGIN = (307, 32001, 32004, 32008, 32013, 32015, 32017, 32018, 32024, 32026, 32028, 32033)
packages: dict[int, str] = {**dict.fromkeys(_HDF5PLUGIN, "hdf5plugin"), 305: "tables"}


def described(code: int, name: str = "") -> str:
    """A filter in words, with the package that h5py needs for it.

    >>> described(32013)
    'zfp (filter 32013; for h5py: pip install hdf5plugin, and import it)'
    >>> described(40000, "mine")
    'filter 40000 (mine, not registered with the HDF Group)'
    """
    if code not in names:
        return f"filter {code} ({name or 'without a name'}, not registered with the HDF Group)"
    if code not in packages:
        return f"{names[code]} (filter {code})"
    return f"{names[code]} (filter {code}; for h5py: pip install {packages[code]}, and import it)"
