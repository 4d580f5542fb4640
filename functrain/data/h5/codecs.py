"""How each filter of HDF5 is undone, with the libraries at hand."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from operator import eq
from struct import Struct
from types import ModuleType
from typing import Any

import numpy as np

from functrain.data.h5.registry import described
from functrain.data.h5.scratch import INSIDE, scratch

Values = tuple[int, ...]
# Fills the whole array, uint8 `(B,)`, from the bytes that the filter gave when it was written.
Decode = Callable[[memoryview, np.ndarray], None]


class DecodeError(Exception):
    """What is wrong with the bytes of a chunk, in words."""


class ShortError(DecodeError):
    """The bytes give less than a chunk: what HDF5 reads there is memory that nothing was written to."""


class Unsupported(Exception):  # noqa: N818
    """Why a filter cannot be undone here, in words."""


@dataclass(frozen=True)
class Codec:
    """One filter undone; `compresses` where the size of the result is not the size of what it is made from."""

    decode: Decode
    compresses: bool


@cache
def installed() -> frozenset[str]:
    """Which of the optional codec packages are there."""
    return frozenset(name for name in ("imagecodecs", "zlib_into") if importlib.util.find_spec(name))


def decoders(installed: frozenset[str]) -> Mapping[int, Callable[[Values], Codec | None]]:
    """For the number of each filter that is known: what makes its codec from the filter's parameters.

    The makers give None where there is nothing to undo, and raise `Unsupported` where a package is missing from
    `installed`, or the parameters make no sense.
    """

    def compression(code: int, name: str, **options: Any) -> Callable[[Values], Codec]:
        return lambda _values: Codec(_filling(name, _imagecodecs(installed, code, name), **options), True)

    return {
        1: lambda _values: Codec(_inflate(installed), True),
        2: lambda values: _shuffle(installed, values),
        32000: compression(32000, "lzf"),
        32001: lambda _values: Codec(_blosc(_imagecodecs(installed, 32001, "blosc")), True),
        32004: compression(32004, "lz4h5"),
        32008: lambda values: _bitshuffle(installed, values),
        32015: compression(32015, "zstd"),
    }


def _imagecodecs(installed: frozenset[str], code: int, name: str) -> Callable[..., Any]:
    """A decoding function of imagecodecs."""
    if "imagecodecs" not in installed:
        raise Unsupported(f"{described(code)} needs imagecodecs: pip install 'functrain[codecs]'")
    module = _module("imagecodecs")
    # It imports each codec when that is first asked for.
    try:
        if getattr(module, name.upper()).available:
            return getattr(module, f"{name}_decode")
    except (ImportError, AttributeError):
        pass
    raise Unsupported(f"{described(code)} is missing from the imagecodecs that is installed")


def _module(name: str) -> ModuleType:
    """A package that is installed, and may still not be one that can be imported here."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"{name} cannot be imported: {error}") from error


def _filling(name: str, decode: Callable[..., Any], **options: Any) -> Decode:
    """A decoding function of imagecodecs, held to fill its output exactly."""

    def fill(data: memoryview, out: np.ndarray) -> None:
        # Some read the first byte before they look whether there is one.
        if not data:
            raise DecodeError(f"no {name} data: 0 bytes")
        try:
            size = len(decode(data, out=out, **options))
        except (RuntimeError, ValueError) as error:
            raise DecodeError(f"{name} data are damaged: {error}") from error
        check_size(f"{name} data give", size, out)

    return fill


def check_size(what: str, size: int, out: np.ndarray) -> None:
    """Raise `DecodeError` unless so many bytes fill the result."""
    if size != len(out):
        raise (ShortError if size < len(out) else DecodeError)(f"{what} {size} bytes, expected {len(out)}")


# --- gzip ------------------------------------------------------------------------------------------------------------


def _inflate(installed: frozenset[str]) -> Decode:
    # Both are libdeflate, which verifies the Adler-32 checksum; this one needs no memory of its own.
    try:
        return _filling("deflate", _imagecodecs(installed, 1, "deflate"))
    except Unsupported:
        deflate: Any = _module("deflate")

    def inflate(data: memoryview, out: np.ndarray) -> None:
        try:
            result = deflate.zlib_decompress(data, len(out))
        except (deflate.DeflateError, ValueError) as error:
            raise DecodeError(f"deflate data are damaged: {error}") from error
        check_size("deflate data give", len(result), out)
        out[:] = np.frombuffer(result, np.uint8)

    return inflate


# --- shuffle ---------------------------------------------------------------------------------------------------------


def _shuffle(installed: frozenset[str], values: Values) -> Codec | None:
    if not values or values[0] < 1:
        raise Unsupported(f"shuffle has the parameters {values}, expected the size of an element")
    itemsize = values[0]
    if itemsize == 1:
        return None
    gather = _planes
    if "zlib_into" in installed and itemsize in (2, 4, 8):
        with suppress(Unsupported):
            gather = _module("zlib_into").unshuffle

    def unshuffle(data: memoryview, out: np.ndarray) -> None:
        check_size("shuffle has", len(data), out)
        # What is left behind the last whole element was not shuffled.
        whole = len(data) // itemsize * itemsize
        gather(data[:whole], out[:whole], itemsize)
        if whole < len(data):
            out[whole:] = np.frombuffer(data[whole:], np.uint8)

    return Codec(unshuffle, False)


def _planes(data: memoryview, out: np.ndarray, itemsize: int) -> None:
    planes, elements = np.frombuffer(data, np.uint8).reshape(itemsize, -1), out.reshape(-1, itemsize)
    if itemsize > 32:
        elements[:] = planes.T
        return
    # One byte of all elements after the other: 3 GB/s, four times as fast as the transposed assignment.
    for place in range(itemsize):
        elements[:, place] = planes[place]


# --- blosc -----------------------------------------------------------------------------------------------------------


def _blosc(decode: Callable[..., Any]) -> Decode:
    fill = _filling("blosc", decode, numthreads=1)

    def unpack(data: memoryview, out: np.ndarray) -> None:
        # The library is not told where the data end, and takes memory for a block: its header must be right about both.
        if len(data) < 16:
            raise DecodeError(f"blosc data are {len(data)} bytes, less than their header")
        size, block, stored = (int.from_bytes(data[place : place + 4], "little") for place in (4, 8, 12))
        check_size("blosc data give", size, out)
        if stored > len(data) or not 0 < block <= size:
            raise DecodeError(f"blosc data claim {stored} bytes in blocks of {block}, there are {len(data)} for {size}")
        fill(data, out)

    return unpack


# --- bitshuffle ------------------------------------------------------------------------------------------------------

_NONE, _LZ4, _ZSTD = 0, 2, 3


def _bitshuffle(installed: frozenset[str], values: Values) -> Codec:
    if len(values) < 3 or values[2] < 1:
        raise Unsupported(f"bitshuffle has the parameters {values}, expected the size of an element at the third place")
    itemsize, block, method = (*values[2:5], 0, 0)[:3]
    unshuffle = _imagecodecs(installed, 32008, "bitshuffle")
    if method == _NONE:
        return Codec(_filling("bitshuffle", unshuffle, itemsize=itemsize, blocksize=block), False)
    if method not in (_LZ4, _ZSTD):
        raise Unsupported(f"bitshuffle is compressed by method {method}, expected 2 (lz4) or 3 (zstd)")
    name = "lz4" if method == _LZ4 else "zstd"
    inflate = _filling(f"bitshuffle {name}", _imagecodecs(installed, 32008, name))
    inflate_all = _filling("bitshuffle lz4", _imagecodecs(installed, 32008, "lz4h5")) if method == _LZ4 else None

    def unpack(data: memoryview, out: np.ndarray) -> None:
        size, block = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:12], "big")
        check_size("bitshuffle data give", size, out)
        if not block or block % (8 * itemsize):
            raise DecodeError(f"bitshuffle blocks have {block} bytes, expected a multiple of {8 * itemsize}")
        # What is left of the last 8 elements follows as it is.
        whole = size // (8 * itemsize) * (8 * itemsize)
        lengths = [min(block, whole - start) for start in range(0, whole, block)]
        sizes = _sizes(data, len(lengths), size - whole)
        shuffled = scratch.take(INSIDE, size)
        # The framing is that of the lz4 filter, and its one call is six times as fast as one for each block of 8 KiB.
        # But there, a block that is no smaller than what it gives is not compressed.
        if inflate_all and sizes and not any(map(eq, sizes, lengths)):
            inflate_all(data if whole == size else memoryview(whole.to_bytes(8, "big") + data[8:]), shuffled[:whole])
        else:
            _each(data, sizes, shuffled[:whole], lengths, inflate)
        shuffled[whole:] = np.frombuffer(data[len(data) - size + whole :], np.uint8)
        _filling("bitshuffle", unshuffle, itemsize=itemsize, blocksize=block // itemsize)(shuffled.data, out)

    return Codec(unpack, True)


def _sizes(data: memoryview, count: int, rest: int) -> list[int]:
    """The size of each compressed block, which stands before it; `rest` bytes follow the last."""
    sizes: list[int] = []
    at = 12
    while len(sizes) < count and at + 4 <= len(data):
        sizes.append(_SIZE.unpack_from(data, at)[0])
        at += 4 + sizes[-1]
    if len(sizes) < count or at + rest != len(data):
        raise DecodeError(f"bitshuffle data are {len(data)} bytes, {len(sizes)} of {count} blocks end at {at}")
    return sizes


_SIZE = Struct(">I")


def _each(data: memoryview, sizes: list[int], out: np.ndarray, lengths: list[int], inflate: Decode) -> None:
    at, start = 12, 0
    for size, length in zip(sizes, lengths):
        inflate(data[at + 4 : at + 4 + size], out[start : start + length])
        at, start = at + 4 + size, start + length
