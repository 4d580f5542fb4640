"""Methods whose last results are remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def remembered(method: Callable[P, R], size: int) -> Callable[P, R]:
    """A bound method that remembers its last `size` results, by its arguments.

    Its object is not kept alive by it: a source that nobody holds any more lets go of files and threads at once, and does
    not wait for the collector of cycles.

    >>> class Doubling:
    ...     def __init__(self):
    ...         self.double = remembered(self.compute, 4)
    ...     def compute(self, n):
    ...         return [n, n]
    >>> doubling = Doubling()
    >>> doubling.double(2) is doubling.double(2)
    True
    """
    weak = weakref.WeakMethod(method)

    @lru_cache(maxsize=size)
    def recall(*arguments: P.args, **named: P.kwargs) -> R:
        alive = weak()
        assert alive is not None
        return alive(*arguments, **named)

    return recall


__all__ = ["remembered"]
