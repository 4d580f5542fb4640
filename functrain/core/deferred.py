"""Batches that nobody has read yet: whoever takes a part's gradient draws that part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.tree import Tree


class Deferred:
    """A batch of `size` examples that is drawn in parts: `draw(start, stop)` gives its examples from start to stop.

    Gradients take it in place of a batch. `parallel` lets each worker draw the part whose gradient it takes (`ttrain!`);
    every other gradient draws it whole. `draw` is a pure function: examples do not depend on where a batch is cut, so that
    it makes no difference who prepares them. Several threads may draw at once.

    Raises `ArgumentError` for a size below 1 or a draw that is no function, and, when drawn, `TreeError` for another number of
    examples than was asked for.

    >>> import torch
    >>> batch = Deferred(5, lambda start, stop: torch.arange(start, stop))
    >>> [draw().tolist() for draw in batch.parts(2)], batch.whole().tolist()
    ([[0, 1, 2], [3, 4]], [0, 1, 2, 3, 4])
    """

    def __init__(self, size: int, draw: Callable[[int, int], Tree]) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ArgumentError(f"a batch has a size of at least 1, got {size!r}")
        if not callable(draw):
            raise ArgumentError(
                f"a deferred batch takes a function (start, stop) that draws examples, got {type(draw).__name__}"
            )
        self.size, self._draw = size, draw

    def parts(self, parts: int) -> Sequence[Callable[[], Tree]]:
        """A function for each of `parts` contiguous parts, of sizes that differ by at most one, that draws it."""
        borders = [0]
        for size in tree.part_sizes(self.size, parts):
            borders.append(borders[-1] + size)
        return [partial(self._part, start, stop) for start, stop in itertools.pairwise(borders)]

    def whole(self) -> Tree:
        """The batch."""
        return self._part(0, self.size)

    def _part(self, start: int, stop: int) -> Tree:
        part = self._draw(start, stop)
        size = tree.batch_size(part)
        if size != stop - start:
            raise TreeError(
                f"asked for the {stop - start} examples from {start} to {stop} of a batch of {self.size}, draw gave {size}"
            )
        return part

    def __repr__(self) -> str:
        return f"<Deferred batch of {self.size}, not drawn yet>"


def drawn(batch: Tree) -> Tree:
    """The batch itself, drawn if nobody has yet."""
    return batch.whole() if isinstance(batch, Deferred) else batch
