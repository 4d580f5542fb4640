"""Shuffling by arithmetic: a keyed bijection on 0 … n−1, computed where it is asked for and never stored.

A Feistel network permutes the numbers of `bit_length(n − 1)` bits, whatever its round function is (Luby and
Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988). A number that leaves
0 … n−1 is sent through again until it is back: cycle walking (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). The domain is less than twice n, so that takes less than two passes on average.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Even numbers, so that the halves end with the widths they began with. The 120 orders of five elements came out
# visibly uneven after 12 rounds (28 standard deviations in chi-square over 60,000 seeds), and even after 24.
_ROUNDS, _SMALL_ROUNDS, _SMALL_BITS = 12, 24, 8
_BLOCK_BITS = 16
_MASK = (1 << 64) - 1
_FIRST, _SECOND, _GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int | None) -> np.ndarray:
    """The index that stands at each of `positions` (int64, within 0 … length−1) in the order of `seed` and `epoch`.

    Neighbouring positions come from a block that is computed once and remembered; scattered ones are computed
    one by one. Without an epoch the order is one of its own, equal to that of no epoch.

    >>> permuted(np.arange(5), 5, seed=0, epoch=0).tolist() != permuted(np.arange(5), 5, seed=0, epoch=1).tolist()
    True
    >>> sorted(permuted(np.arange(5), 5, seed=0, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    blocks = positions >> _BLOCK_BITS
    first, last = int(blocks.min()), int(blocks.max())
    if first == last:
        start = first << _BLOCK_BITS
        return _block(length, seed, epoch, first)[positions - start if start else positions]
    if last - first == 1 and positions.size > 1:
        result = np.empty_like(positions)
        for number in (first, last):
            here = blocks == number
            result[here] = _block(length, seed, epoch, number)[positions[here] - (number << _BLOCK_BITS)]
        return result
    return _walk(positions.astype(np.uint64), length, _round_keys(length, seed, epoch))


@lru_cache(maxsize=16)
def _block(length: int, seed: int, epoch: int | None, number: int) -> np.ndarray:
    # 16 blocks of 512 KiB at most: every source in use keeps its own, at 0.05 µs a position.
    keys = _round_keys(length, seed, epoch)
    if length <= 1 << _BLOCK_BITS:
        result = _small(length, keys)
    else:
        start = number << _BLOCK_BITS
        result = _walk(np.arange(start, min(start + (1 << _BLOCK_BITS), length), dtype=np.uint64), length, keys)
    result.setflags(write=False)
    return result


def _small(length: int, keys: np.ndarray) -> np.ndarray:
    # The network once over its whole domain; walking is then looking up, and costs next to nothing.
    bits = (length - 1).bit_length()
    table = _feistel(np.arange(1 << bits, dtype=np.uint64), bits, keys).astype(np.int64)
    values = table[:length].copy()
    beyond = np.flatnonzero(values >= length)
    while beyond.size:
        values[beyond] = table[values[beyond]]
        beyond = beyond[values[beyond] >= length]
    return values


def _walk(values: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    bits = (length - 1).bit_length()
    values = _feistel(values, bits, keys)
    beyond = np.flatnonzero(values >= length)
    while beyond.size:
        again = _feistel(values[beyond], bits, keys)
        values[beyond] = again
        beyond = beyond[again >= length]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    wide, narrow = bits - bits // 2, bits // 2
    left, right = values >> np.uint64(wide), values & np.uint64((1 << wide) - 1)
    for key in keys:
        # `narrow` is the width of the left half, which this round replaces; a shift by all 64 bits is undefined.
        if narrow:
            left ^= _mixed(right ^ key, 64 - narrow)
        left, right = right, left
        wide, narrow = narrow, wide
    return (left << np.uint64(wide)) | right


def _mixed(values: np.ndarray, shift: int) -> np.ndarray:
    # The top bits of a product depend on all bits of its factors. `values` is a fresh array, and is overwritten.
    values *= np.uint64(_FIRST)
    values ^= values >> np.uint64(32)
    values *= np.uint64(_SECOND)
    values >>= np.uint64(shift)
    return values


def _round_keys(length: int, seed: int, epoch: int | None) -> np.ndarray:
    # Hashed one into the other, never added: seed 0 in epoch 1 has nothing to do with seed 1 in epoch 0.
    key = _hash(_hash(seed & _MASK ^ _GOLDEN) ^ (0 if epoch is None else epoch + 1))
    rounds = _SMALL_ROUNDS if length <= 1 << _SMALL_BITS else _ROUNDS
    return np.array([_hash(key ^ number) for number in range(1, rounds + 1)], dtype=np.uint64)


def _hash(value: int) -> int:
    value &= _MASK
    value = (value ^ value >> 30) * _FIRST & _MASK
    value = (value ^ value >> 27) * _SECOND & _MASK
    return value ^ value >> 31
