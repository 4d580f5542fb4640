"""What one rank takes of every batch."""

from __future__ import annotations

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.data.arguments import ranked
from functrain.data.deferred import DeferredBatches
from functrain.data.source import Source
from functrain.data.transform import Batch


def part(source: Source, rank: int, size: int) -> Source:
    """The part of `Source.part`, which see."""
    rank, size = ranked(rank, size)
    batches = source.batches if isinstance(source, DeferredBatches) else source
    if isinstance(batches, BatchPart):
        raise ArgumentError(f"these batches are a part already, of rank {batches.rank} of {batches.ranks}: part the whole")
    if isinstance(batches, Batch):
        mine = BatchPart(batches, rank, size)
        return mine if batches is source else DeferredBatches(mine)
    raise ArgumentError(
        f"part takes the batches that .batch gives, got {source!r}: write .part(rank, size) right after .batch(size), and map "
        "before it or after; elements by themselves are dealt out by .shard(rank, size)"
    )


class BatchPart(Batch):
    """The rows of every batch that are one rank's."""

    def __init__(self, batches: Batch, rank: int, ranks: int) -> None:
        super().__init__(batches.source, batches.size, drop_last=batches.dropped > 0)
        self.rank, self.ranks = rank, ranks
        last = batches.rest if batches.rest and not batches.dropped else batches.size
        if last < ranks:
            which = "batches have" if last == batches.size else f"the last batch of {batches.size} has"
            ways = "" if last == batches.size else "drop_last=True, or "
            raise ArgumentError(f"{which} {last} rows, too few for {ranks} ranks: {ways}another size in .batch(size)")

    def places(self, i: int) -> range:
        whole = super().places(i)
        sizes = tree.part_sizes(len(whole), self.ranks)
        start = sum(sizes[: self.rank])
        return whole[start : start + sizes[self.rank]]

    def facts(self) -> dict[str, str]:
        sizes = tree.part_sizes(self.size, self.ranks)
        part = f"rank {self.rank} of {self.ranks}: {sizes[self.rank]:,} rows of each, contiguous"
        return {**super().facts(), "part": part}
