"""Fletcher's checksum as HDF5 computes it."""

from __future__ import annotations

import numpy as np

# Sums over rows of 1024 words and over columns of 65536 rows stay below 2³², where NumPy adds fastest.
_ROW = 1024
_ROWS = 1 << 16


def fletcher32(data: bytes | memoryview) -> int:
    """The checksum of HDF5's fletcher32 filter over `data`: two sums of its big-endian 16-bit words, modulo 65535.

    With words `w_0 … w_{n−1}` (a last odd byte is the upper half of one more), the lower 16 bits are `Σ w_i`, the
    upper ones `Σ (n − i) w_i`; a sum that is a multiple of 65535 gives 65535, unless all words are zero. Source:
    J. G. Fletcher, An arithmetic checksum for serial transmissions (1982).

    >>> hex(fletcher32(b"abcd"))
    '0x2629c4c6'
    >>> fletcher32(bytes(8)), hex(fletcher32(bytes([255, 255])))
    (0, '0xffffffff')
    """
    words = np.frombuffer(data, "<u2", len(data) // 2)
    count = len(words) + len(data) % 2
    # A last odd byte is a little-endian word as it is: the halves of all words are exchanged below.
    plain = weighted = data[-1] if len(data) % 2 else 0
    whole = len(words) // _ROW * _ROW
    for start in range(0, whole, _ROW * _ROWS):
        rows = words[start : min(start + _ROW * _ROWS, whole)].reshape(-1, _ROW)
        sums = _sums(rows, count - start)
        plain, weighted = plain + sums[0], weighted + sums[1]
    sums = _sums(words[whole:].reshape(1, -1), count - whole)
    return _residue(weighted + sums[1], plain + sums[0]) << 16 | _residue(plain + sums[0], plain + sums[0])


def _sums(rows: np.ndarray, weight: int) -> tuple[int, int]:
    """The sum of all words and their weighted sum, modulo 65535; the first word has `weight`, each other one less."""
    by_row, by_column = rows.sum(1, np.uint32), rows.sum(0, np.uint32)
    weights = (weight - rows.shape[1] * np.arange(len(rows))) % 65535
    within = np.arange(rows.shape[1])
    return int(by_row.sum(dtype=np.int64)), int(weights @ by_row - within @ by_column)


def _residue(total: int, plain: int) -> int:
    # The sums are over words read little-endian: to exchange their halves is to multiply by 256, modulo 65535.
    return (total * 256 % 65535 or 65535) if plain else 0
