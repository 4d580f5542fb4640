"""What the C library's heap is told before a program takes steps: keep the memory that a step frees for the next one."""

from __future__ import annotations

from functools import cache

import torch

# glibc gives the end of a heap back to the system when more than twice its "mmap threshold" is free there, and raises that
# threshold, up to 32 MiB, whenever a larger block is freed. A block that is never written to takes no memory.
_BLOCK = 31 << 20


@cache
def settled() -> None:
    """Let the heap keep up to 62 MiB of freed memory, once in a process: a block is taken and freed, no setting is changed.

    A step frees what the next one takes. Where the heap shrank in between, its pages were faulted in again: 3000 faults and
    12 of 44 ms for a convolutional network's gradient in 8 parts on two threads, which wait for each other there; and up to
    1000 faults in a step of 1.9 M parameters.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)
