"""What a dataset's header says and h5py does not: how HDF5 finds its chunks."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py

# The kinds of index, by HDF5's numbers: 0 is the B-tree of all files before 1.10, which its numbers begin behind.
OLD_TREE, SINGLE, IMPLICIT, FIXED_ARRAY, EXTENSIBLE_ARRAY, TREE = range(6)
_LAYOUT, _CONTINUATION = 0x08, 0x10
_CHUNKED = 2
# A damaged header may lead in a circle, or claim any size.
_MOST_BLOCKS, _LARGEST_BLOCK = 1000, 1 << 24

Read = Callable[[int, int], bytes]


def index_kind(dataset: h5py.Dataset) -> int | None:
    """The kind of a chunked dataset's index; None where its header cannot be looked at (in a remote file) or understood.

    Source: the HDF5 File Format Specification 3.0, sections IV.A.1 and IV.A.2.i.
    """
    import h5py

    file = dataset.file
    if file.driver != "sec2" or file.id.get_create_plist().get_sizes() != (8, 8):
        return None
    descriptor, base = file.id.get_vfd_handle(), file.userblock_size

    def read(start: int, size: int) -> bytes:
        return os.pread(descriptor, size, base + start)

    try:
        for kind, message in _messages(read, h5py.h5o.get_info(dataset.id).addr):
            if kind == _LAYOUT:
                return _kind(message)
    except (struct.error, IndexError, ValueError, OverflowError, OSError):
        pass
    return None


def _kind(layout: bytes) -> int | None:
    if layout[0] < 4:
        return OLD_TREE
    if layout[1] != _CHUNKED:
        return None
    # Version, class, flags, rank, the bytes that encode a size, the sizes.
    rank, width = layout[3], layout[4]
    return layout[5 + rank * width]


def _messages(read: Read, address: int) -> Iterator[tuple[int, bytes]]:
    """The messages of an object header: their kinds and bytes."""
    start = read(address, 64)
    if start[:4] == b"OHDR":
        flags = start[5]
        place = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        size = int.from_bytes(start[place : place + width], "little")
        first, head, ordered = (address + place + width, size), struct.Struct("<BHB"), 2 if flags & 4 else 0
        around = (4, 4)
    else:
        first, head, ordered = (address + 16, struct.unpack_from("<I", start, 8)[0]), struct.Struct("<HHB3x"), 0
        around = (0, 0)
    blocks = [first]
    for number, (begin, size) in enumerate(blocks):
        block, at = read(begin, min(size, _LARGEST_BLOCK)), 0
        while at + head.size + ordered <= len(block):
            kind, length, _flags = head.unpack_from(block, at)
            at += head.size + ordered
            message = block[at : at + length]
            at += length
            if kind == _CONTINUATION and number < _MOST_BLOCKS:
                there, long = struct.unpack("<QQ", message)
                # Later ones have a signature before them, and a checksum behind.
                blocks.append((there + around[0], long - sum(around)))
            yield kind, message
