"""Memory for cartridges: page-aligned, in huge pages where the system has them.

Fresh memory costs a page fault per page at first touch: in pages of 4 KiB that takes several times as long as filling
them. Page alignment also lets engines use the memory as it is.
"""

from __future__ import annotations

import mmap
import sys


def allocate(num_bytes: int) -> memoryview:
    """Writable zeros that are given back when the last view of them goes away."""
    if not num_bytes:
        return memoryview(bytearray())
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
