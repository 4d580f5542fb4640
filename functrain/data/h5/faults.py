"""Reading memory that maps a file which may be cut short meanwhile.

A page of a map that lies behind the end of its file has no memory, and reading it ends the process (SIGBUS). To ask for the
file's size before does not help: it may shrink during the read. So the signal is taken here, for maps that say so and only
while they are read: empty memory is put where the file was, the read goes on over zeros, and is found to be void when it
ends. Asking the system to copy instead (`process_vm_readv`, which fails with an error) read scattered rows at a quarter of
the speed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from typing import Any

import numpy as np

from functrain.data.forks import renew

_SIGBUS = 7
# From the C library's headers, the same for all its 64-bit machines on Linux: SA_SIGINFO | SA_NODEFER; where a siginfo_t has
# the cause of the signal, and the address that could not be read; BUS_ADRERR, there is nothing at that address.
_FLAGS = 4 | 0x40000000
_CAUSE, _ADDRESS = 8, 16
_NOT_THERE = 2
_FIXED = 0x10


class _Action(ctypes.Structure):
    """What is done at a signal: `struct sigaction`."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class GuardedMap:
    """The memory of a map. In its `with` block, what is gone with the end of the file reads as zeros, and `cut` says so.

    Threads may be in it at the same time.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        found = np.frombuffer(memory, np.uint8)
        self.start = found.ctypes.data
        self.stop = self.start + len(found)
        self.cut = False

    def __enter__(self) -> None:
        if _guard is not None:
            _guard.begin(self)

    def __exit__(self, *exception: object) -> None:
        if _guard is not None:
            _guard.end(self)


class _Guard:
    """The handler of the signal, there only while a map is read; at other times, and for other memory, the one before it."""

    def __init__(self) -> None:
        # Calls that keep the interpreter's lock: nothing comes between them.
        library: Any = ctypes.PyDLL(None)
        self._sigaction, self._mmap = library.sigaction, library.mmap
        self._sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._mmap.restype = ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._handler = kind(self._met)
        self._ours = _Action(handler=ctypes.cast(self._handler, ctypes.c_void_p), flags=_FLAGS)
        self._theirs = _Action()
        self._at_ours, self._at_theirs = ctypes.addressof(self._ours), ctypes.addressof(self._theirs)
        # Which thread reads what: to end twice does no harm, as after an interrupt.
        self._read: set[tuple[int, GuardedMap]] = set()
        self._lock = threading.Lock()
        renew(self)

    def after_fork(self) -> None:
        """In a forked process: nobody reads, and nobody holds the lock."""
        self._lock = threading.Lock()
        if self._read:
            self._read.clear()
            self._sigaction(_SIGBUS, self._at_theirs, None)

    def begin(self, mapping: GuardedMap) -> None:
        with self._lock:
            if not self._read:
                self._sigaction(_SIGBUS, self._at_ours, self._at_theirs)
            self._read.add((threading.get_ident(), mapping))

    def end(self, mapping: GuardedMap) -> None:
        with self._lock:
            found = bool(self._read)
            self._read.discard((threading.get_ident(), mapping))
            if found and not self._read:
                self._sigaction(_SIGBUS, self._at_theirs, None)

    def _met(self, signal: int, information: int, context: int) -> None:
        """Called where the read stands still, in the thread that reads; what it read is read again when this returns."""
        caused = ctypes.c_int.from_address(information + _CAUSE).value
        address = ctypes.c_size_t.from_address(information + _ADDRESS).value
        for _thread, mapping in tuple(self._read) if caused == _NOT_THERE else ():
            if mapping.start <= address < mapping.stop:
                mapping.cut = True
                page = address - address % mmap.PAGESIZE
                flags = _FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                if self._mmap(page, mapping.stop - page, mmap.PROT_READ, flags, -1, 0) == page:
                    return
        self._sigaction(_SIGBUS, self._at_theirs, None)
        if caused <= 0:
            # Sent by a program, it does not come again by itself.
            os.kill(os.getpid(), _SIGBUS)
            self._sigaction(_SIGBUS, self._at_ours, None)
        # Else it comes again as soon as the same memory is read again, and goes to whom it went before.


_guard = _Guard() if sys.platform == "linux" and sys.maxsize > 2**32 else None
