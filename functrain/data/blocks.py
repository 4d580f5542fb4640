"""Shuffling in blocks of runs, so that what is stored together is read together."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from functrain.core import random
from functrain.core.errors import ArgumentError
from functrain.core.explain import readable
from functrain.data.budget import size_of
from functrain.data.order import Shuffle
from functrain.data.permutation import hashed, inverse, permuted, permuted_each
from functrain.data.remembered import remembered
from functrain.data.runs import Runs
from functrain.data.source import Source

# Apart from each other, and from what others draw of the same seed.
_RUNS, _BLOCKS = 0x2545F4914F6CDD1D, 0x3C6EF372FE94F82B
_FEW = 4


def shuffled(source: Source, seed: int, within: int | str | None) -> Shuffle:
    """The order of `Source.shuffle`, which see."""
    if within is None:
        return Shuffle(source, seed)
    size = size_of("within", within)
    runs = source.runs()
    if runs is None or not len(source):
        return Shuffle(source, seed, f"{readable(size)}, not needed: each element lies alone, so this is the full shuffle")
    if runs.length != len(source) or any(length < 0 or step < 1 for length, step in runs.stretches):
        raise ArgumentError(
            f"runs() of {source!r} are of {runs.length:,} elements: expected all of the source, in steps of 1 or more: {runs}"
        )
    return Blocks(source, seed, size, runs)


class Blocks(Shuffle):
    """Runs in a permuted order, cut into blocks that fit into `within` bytes; elements permuted within their block.

    In an epoch run ρ(k) stands at slot k, ρ a bijection of the R runs keyed by seed and epoch. Slots are cut into
    B = ⌈R / g⌉ blocks whose numbers of runs differ by at most one, g = ⌊within / bytes of the longest run⌋, at least 1.
    The m elements of a block are permuted by a bijection of 0 … m−1 keyed by seed, block and epoch.

    `quality` = 1 − (p_blocks − p_full), where p is the probability that two neighbours in order, as two elements of one batch
    mostly are, come from one run. With N elements and runs of n_r elements

        p_full   = Σ_r n_r (n_r − 1) / (N (N − 1))
        p_blocks = Σ_r n_r (n_r − 1) E[1 / m_r] / (N − 1),    E[1 / m_r] ≈ (1 + s² / μ²) / μ

    where the block of r has m_r elements: with j runs in it, μ = n_r + (j − 1) (N − n_r) / (R − 1) on average, and variance
    s² = (j − 1) (R − j) / (R − 1) · var(n). Runs of one length make p_blocks = B p_full, exactly, and each element as likely at
    each position as any other; of runs of different lengths both hold nearly.
    """

    def __init__(self, source: Source, seed: int, within: int, runs: Runs) -> None:
        super().__init__(source, seed)
        self.within, self.layout = within, runs
        self.places = _Places(runs)
        longest = max(self.places.lengths)
        held = max(1, within // max(1, longest * runs.size))
        self.blocks = -(-runs.number // held)
        # The first `larger` blocks have one run more than the others.
        self.fewest, self.larger = divmod(runs.number, self.blocks)
        self.bytes = min(len(self), (self.fewest + (self.larger > 0)) * longest) * runs.size
        self.quality = self._quality()
        key = random.key(seed)
        self._runs_seed = int(random.fold_in(key, _RUNS))
        self._blocks_key = random.fold_in(key, _BLOCKS).reshape(1).numpy().view(np.uint64)
        self._line = remembered(self._laid, 4)

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        line = self._line(epoch)
        block = self._block(line.slots(positions)[0])
        start = line.begins(self._first(block))
        here = start + self._mixed(positions - start, line.begins(self._first(block + 1)) - start, block, epoch)
        slots, begins = line.slots(here)
        return self.places.first(permuted(slots, self.layout.number, self._runs_seed, epoch)) + here - begins

    def announce(self, indices: np.ndarray, epoch: int) -> None:
        super().announce(indices, epoch)
        # Of the next block as large a share as this is of the present one: else all of its runs are wanted at once, where
        # one block ends, and whoever trains waits for them.
        start, stop = int(indices.min()), int(indices.max()) + 1
        line = self._line(epoch)
        first, last = (int(self._block(line.slots(np.array([place]))[0])[0]) for place in (start, stop - 1))
        # Where an announcement is longer than blocks are, the next announcement comes early enough.
        for block in range(first, min(last + 1, first + 2)):
            ahead = self._ahead(block, start, stop, epoch)
            if ahead.size:
                self.source.announce(ahead, epoch)

    def _ahead(self, block: int, start: int, stop: int, epoch: int) -> np.ndarray:
        """The first elements of the runs of the next block that come up while positions start … stop−1 of this one are read."""
        line = self._line(epoch)
        firsts = self._first(block + np.arange(3))
        if firsts[1] >= self.layout.number:
            return np.empty(0, dtype=np.int64)
        begin, end = (int(place) for place in line.begins(firsts[:2]))
        first, runs = int(firsts[1]), int(firsts[2] - firsts[1])
        low, high = (first + -(-(min(max(place, begin), end) - begin) * runs // (end - begin)) for place in (start, stop))
        slots = np.arange(low, high)
        return self.places.first(permuted(slots, self.layout.number, self._runs_seed, epoch)) if slots.size else slots

    def _laid(self, epoch: int) -> _Line:
        odd = self.places.odd
        slots = inverse(odd, self.layout.number, self._runs_seed, epoch) if odd.size else odd
        order = np.argsort(slots)
        return _Line.of(self.places.step, slots[order], self.places.odd_lengths[order], self.layout.number)

    def _first(self, block: np.ndarray) -> np.ndarray:
        """The first slot of a block."""
        return block * self.fewest + np.minimum(block, self.larger)

    def _block(self, slots: np.ndarray) -> np.ndarray:
        """The block that a slot is in."""
        border = self.larger * (self.fewest + 1)
        return np.where(slots < border, slots // (self.fewest + 1), self.larger + (slots - border) // self.fewest)

    def _mixed(self, places: np.ndarray, sizes: np.ndarray, blocks: np.ndarray, epoch: int) -> np.ndarray:
        numbers, group = np.unique(blocks, return_inverse=True)
        seeds = hashed(self._blocks_key ^ numbers.astype(np.uint64)).view(np.int64)
        if len(numbers) > _FEW:
            return permuted_each(places, sizes, seeds[group], np.full_like(places, epoch))
        result = np.empty_like(places)
        for number, seed in enumerate(seeds.tolist()):
            here = np.flatnonzero(group == number)
            result[here] = permuted(places[here], int(sizes[here[0]]), seed, epoch)
        return result

    def _quality(self) -> float:
        count, runs = len(self), self.layout.number
        if runs == 1 or count == 1:
            return 1.0
        n, number = np.array(sorted(self.places.lengths.items()), dtype=np.float64).T
        pairs = number * n * (n - 1) / (count - 1)
        spread = (number * (n - count / runs) ** 2).sum() / runs
        p_blocks = 0.0
        for held, blocks in ((self.fewest + 1, self.larger), (self.fewest, self.blocks - self.larger)):
            mean = n + (held - 1) * (count - n) / (runs - 1)
            variance = (held - 1) * (runs - held) / (runs - 1) * spread
            p_blocks += blocks * held / runs * float((pairs * (1 + variance / mean**2) / mean).sum())
        return 1 - (p_blocks - float(pairs.sum()) / count)

    def facts(self) -> dict[str, str]:
        held = f"{self.fewest:,} or {self.fewest + 1:,}" if self.larger else f"{self.fewest:,}"
        least, most, odd = min(self.places.lengths), max(self.places.lengths), self.places.odd.size
        lengths = f"{least:,}" if least == most else f"{least:,} … {most:,}"
        return {
            **super().facts(),
            "order": f"runs in an order keyed by seed {self.seed} and epoch, in blocks; elements shuffled within their block",
            "blocks": f"{self.blocks:,} of {held} runs, {readable(self.bytes)} at most (within={readable(self.within)})",
            "runs": f"{self.layout.number:,} of {lengths} elements of {readable(self.layout.size)}",
            "quality": f"{self.quality:.4f} (a full shuffle: 1)",
            "stored": f"{readable(16 * odd)} an epoch, for {odd:,} runs of another length" if odd else "nothing",
        }


class _Places:
    """Where runs lie in the source. Most have `step` elements; `odd` ones, by number, have `odd_lengths`."""

    def __init__(self, runs: Runs) -> None:
        stretches = np.array([stretch for stretch in runs.stretches if stretch[0]], dtype=np.int64)
        self.sizes = stretches[:, 1]
        numbers = -(-stretches[:, 0] // self.sizes)
        # Each stretch's first run, and first element.
        self.runs = np.cumsum(numbers) - numbers
        self.starts = np.cumsum(stretches[:, 0]) - stretches[:, 0]
        lasts = stretches[:, 0] - (numbers - 1) * self.sizes
        counted: Counter[int] = Counter()
        for size, number, last in zip(self.sizes.tolist(), numbers.tolist(), lasts.tolist()):
            counted[size] += number - 1
            counted[last] += 1
        self.lengths = {length: number for length, number in counted.items() if number}
        self.step = max(self.lengths, key=lambda length: (self.lengths[length], length))
        others = [
            (np.arange(first, first + number - 1), np.full(number - 1, size))
            for first, number, size in zip(self.runs.tolist(), numbers.tolist(), self.sizes.tolist())
            if size != self.step
        ]
        short = lasts != self.step
        odd = [*others, ((self.runs + numbers - 1)[short], lasts[short])]
        self.odd, self.odd_lengths = (np.concatenate(each).astype(np.int64) for each in zip(*odd))

    def first(self, runs: np.ndarray) -> np.ndarray:
        """The first element of each of `runs`."""
        stretch = np.searchsorted(self.runs, runs, "right") - 1
        return self.starts[stretch] + (runs - self.runs[stretch]) * self.sizes[stretch]


class _Line(NamedTuple):
    """The runs of an epoch laid end to end, `step` elements to a slot but for the odd ones.

    `odd`: their slots, ascending, between −1 and the number of slots; `ends`: where each of them ends, from 0 for slot −1 on.
    """

    step: int
    odd: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, step: int, odd: np.ndarray, lengths: np.ndarray, number: int) -> _Line:
        ends = (odd + 1) * step + np.cumsum(lengths - step)
        return cls(step, np.concatenate([[-1], odd, [number]]), np.concatenate([[0], ends]))

    def slots(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slot that each place is in, and where that slot begins."""
        before = np.searchsorted(self.ends, places, "right") - 1
        shift = self._shift(before)
        # Within a longer odd run the quotient runs on.
        slots = np.minimum((places - shift) // self.step, self.odd[before + 1])
        return slots, slots * self.step + shift

    def begins(self, slots: np.ndarray) -> np.ndarray:
        """Where each slot begins."""
        return slots * self.step + self._shift(np.searchsorted(self.odd, slots, "left") - 1)

    def _shift(self, before: np.ndarray) -> np.ndarray:
        """By how much the odd runs up to `before` have moved what follows."""
        return self.ends[before] - (self.odd[before] + 1) * self.step
