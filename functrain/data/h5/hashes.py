"""Hashes of what datasets hold, whatever their layout in the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from functrain.core.errors import DataError
from functrain.data.h5.contents import contents
from functrain.data.h5.files import intact, opened
from functrain.data.h5.layout import layout_of
from functrain.data.h5.plausible import plausible
from functrain.data.h5.raw import is_url
from functrain.data.h5.readers import Readers
from functrain.data.h5.sequences import righted
from functrain.data.h5.slabs import slabs

if TYPE_CHECKING:
    import h5py

# Bytes that are read, and hashed, at once; and at most, where chunks have that many rows.
_PIECE, _MOST = 16 << 20, 64 << 20


def content_hash(path: str | os.PathLike[str], group: str | None = None) -> dict[str, str] | str:
    """The SHA-256 of every dataset in a file, or in a group of it and all groups below, by name; of a dataset, its own alone.

    A hash is that of a dataset's dtype, shape and elements in C order. Chunks, filters, byte order on disk, fill values and
    attributes do not enter it; a change of one byte, of the dtype, or of the order of rows changes this hash and no other.
    Links to datasets count as datasets; groups behind links are left out. Takes as long as reading does, in bounded memory.

    What is hashed is the text `functrain content 1`, the dtype and the shape, each ended by a newline, and the elements:
    little-endian numbers, bool as one byte, strings of fixed length as their bytes, fields of a compound one after the other
    without padding, object references as the name of their object. What varies in length, strings as well, has its length
    before it (bytes or elements, 8 bytes little-endian).

    Raises `DataError` for a file, group or dataset that cannot be read, and for region references, which have no content.

    >>> import functrain as ft, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> for name, how in (("a", None), ("b", "gzip")):
    ...     ft.h5write(f"{folder.name}/{name}.h5", {"train": {"x": np.arange(9)}}, compression=how)
    >>> ft.content_hash(folder.name + "/a.h5") == ft.content_hash(folder.name + "/b.h5")
    True
    >>> list(ft.content_hash(folder.name + "/a.h5")), len(ft.content_hash(folder.name + "/a.h5", "train/x"))
    (['train/x'], 64)
    >>> folder.cleanup()
    """
    import h5py

    path = os.fspath(path)
    hashes = {}
    with opened(path) as file, closing(Hasher(path)) as hasher:
        prefix = (group or "").strip("/")
        for entry in contents(file, path, group):
            if entry.error is not None:
                raise DataError(f"{entry.name!r} in {path!r} cannot be hashed: {entry.error}")
            if isinstance(entry.item, h5py.Dataset):
                if entry.name == prefix:
                    return hasher.of(entry.item, entry.name)
                hashes[entry.name.removeprefix(prefix).lstrip("/")] = hasher.of(entry.item, entry.name)
    return hashes


class Hasher:
    """Hashes datasets of one file: a piece is hashed while the next is read."""

    def __init__(self, path: str, storage: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._readers = Readers(path, memory=_MOST, storage=storage)
        self._beside = ThreadPoolExecutor(1, "functrain-hash")

    def of(self, dataset: h5py.Dataset, name: str) -> str:
        """The hash of one dataset; `DataError` where it cannot be read."""
        where = f"dataset {name!r} in {self._path!r}"
        with intact(where):
            plausible(dataset)
            shape = "null" if dataset.shape is None else "×".join(map(str, dataset.shape))
            digest = hashlib.sha256(f"functrain content 1\n{canonical(dataset.dtype, where)}\n{shape}\n".encode())
            update: Future[None] | None = None
            for piece in self._pieces(dataset, name):
                if update is not None:
                    update.result()
                update = self._beside.submit(digest.update, piece)  # type: ignore[arg-type]
            if update is not None:
                update.result()
        return digest.hexdigest()

    def _pieces(self, dataset: h5py.Dataset, name: str) -> Iterator[bytes | np.ndarray]:
        """The elements in C order, encoded."""
        if dataset.shape is None or not dataset.size:
            return
        encode = encoder(dataset.dtype, dataset.file)
        # What varies in length lies in the file uncompressed: this is more than its mean.
        beside = 64 + dataset.file.id.get_filesize() // dataset.size if dataset.dtype.hasobject else 0
        width = dataset.dtype.itemsize + beside
        row = int(np.prod(dataset.shape[1:], dtype=object)) * width
        if not dataset.shape or dataset.dtype.hasobject or row > _PIECE:
            for slab in slabs(dataset.shape, width, _PIECE, dataset.chunks):
                yield encode(np.asarray(dataset[slab]))
            return
        reader = self._readers.reader(layout_of(dataset, self._path, name, 0, not is_url(self._path)))
        # Chunks are decoded again for each piece that they reach into: here at most twice for every 64 MiB of such rows.
        run = min(dataset.chunks[0] if dataset.chunks else 1, max(1, _MOST // row))
        step = max(run, _PIECE // row // run * run)
        for start in range(0, dataset.shape[0], step):
            yield encode(reader.rows(slice(start, min(start + step, dataset.shape[0]))))

    def close(self) -> None:
        """Let go of the file, end the thread."""
        self._beside.shutdown()
        self._readers.close()


# --- dtypes and elements -------------------------------------------------------------------------------------


def canonical(dtype: np.dtype, where: str = "a dataset") -> str:
    """A dtype as text that is the same for every byte order and padding; `DataError` for region references.

    >>> canonical(np.dtype([("x", ">f4"), ("y", "<i2", (3,))]))
    'compound(x:float32,y:array[3](int16))'
    """
    import h5py

    enum, text, inner = h5py.check_enum_dtype(dtype), h5py.check_string_dtype(dtype), h5py.check_vlen_dtype(dtype)
    if h5py.check_ref_dtype(dtype) is h5py.RegionReference:
        raise DataError(f"{where} holds region references, which have no content to hash")
    if h5py.check_ref_dtype(dtype) is not None:
        return "reference"
    if text is not None:
        return f"string[{'variable' if text.length is None else text.length},{text.encoding}]"
    if inner is not None:
        return f"variable({canonical(np.dtype(inner), where)})"
    if enum is not None:
        members = ",".join(f"{name}={value}" for name, value in sorted(enum.items(), key=lambda member: (member[1], member[0])))
        return f"enum({dtype.name};{members})"
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return f"array[{','.join(map(str, shape))}]({canonical(base, where)})"
    if dtype.names is not None:
        return f"compound({','.join(f'{name}:{canonical(dtype[name], where)}' for name in dtype.names)})"
    return f"opaque[{dtype.itemsize}]" if dtype.kind == "V" else dtype.name


def encoder(dtype: np.dtype, file: h5py.File) -> Callable[[np.ndarray], bytes | np.ndarray]:
    """The function that turns arrays of this dtype into the bytes that are hashed."""
    if not dtype.hasobject:
        packed = _packed(dtype)
        return lambda array: np.ascontiguousarray(_converted(array, packed)).reshape(-1).view(np.uint8)
    one = _element(dtype, file)
    return lambda array: b"".join(map(one, array.reshape(-1)))


def _packed(dtype: np.dtype) -> np.dtype:
    """The same dtype in little-endian byte order, without padding."""
    if dtype.subdtype is not None:
        return np.dtype((_packed(dtype.subdtype[0]), dtype.subdtype[1]))
    if dtype.names is not None:
        return np.dtype([(name, _packed(dtype[name])) for name in dtype.names])
    return dtype.newbyteorder("<")


def _converted(array: np.ndarray, packed: np.dtype) -> np.ndarray:
    if array.dtype.names is None:
        return array.astype(packed.base, copy=False)
    # By name: NumPy would match the fields of two compounds by place, and copy what lies between them.
    result = np.empty(array.shape, packed)
    for name in packed.names or ():
        result[name] = _converted(array[name], packed[name])
    return result


def _element(dtype: np.dtype, file: h5py.File) -> Callable[[Any], bytes]:
    """The function that turns one element, some of which varies in length, into bytes."""
    import h5py

    if h5py.check_string_dtype(dtype) is not None and dtype.hasobject:
        return lambda text: _counted(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text or b""))
    if h5py.check_ref_dtype(dtype) is not None:
        return lambda target: _counted((h5py.h5r.get_name(target, file.id) or b"") if target else b"")
    inner = h5py.check_vlen_dtype(dtype)
    if inner is not None:
        base = np.dtype(inner)
        encode = encoder(base, file)
        return lambda values: len(values).to_bytes(8, "little") + bytes(encode(np.asarray(righted(values, base), base)))
    if dtype.names is not None:
        fields = [(name, _element(dtype[name], file)) for name in dtype.names]
        return lambda record: b"".join(one(record[name]) for name, one in fields)
    encode = encoder(dtype.base, file)
    return lambda value: bytes(encode(np.asarray(value, dtype.base)))


def _counted(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data
