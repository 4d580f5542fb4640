"""What begins anew in a forked process."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """What another thread of the parent process may have been at, when it forked."""

    def after_fork(self) -> None:
        """Begin anew, in the child: it has one thread, and nobody else will let go of the locks that are held."""
        ...


_known: weakref.WeakSet[Forked] = weakref.WeakSet()


def renew(thing: Forked) -> None:
    """Have `thing.after_fork()` called in each forked process, before anything else is done there."""
    _known.add(thing)


def _after_fork() -> None:
    for thing in list(_known):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
