"""Methods whose last results are remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

Result = TypeVar("Result")


def remembered(method: Callable[..., Result], size: int) -> Callable[..., Result]:
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
    def recall(*arguments: Any) -> Result:
        alive = weak()
        assert alive is not None
        return alive(*arguments)

    return recall


__all__ = ["remembered"]
