"""Memory for cartridges: page-aligned, in huge pages where the system has them, and used again.

Fresh memory costs a page fault per page at first touch: in pages of 4 KiB that takes several times as long as filling
them, and longer still on a virtual machine whose host has taken the page back. Versions come one after the other and
are equal in size, so the memory of the last one that went is kept for the next. Page alignment also lets engines use
the memory as it is.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref

# At most one block. A list, because its operations are atomic: blocks come back whenever a thread drops the last view.
_spare: list[mmap.mmap] = []


def allocate(num_bytes: int) -> memoryview:
    """Writable memory with anything in it, ours until the last view of it goes away."""
    if not num_bytes:
        return memoryview(bytearray())
    block = _take_spare(num_bytes) or _new(num_bytes)
    # What is watched is the array: a memory map can't tell when its views are gone.
    array = (ctypes.c_ubyte * num_bytes).from_buffer(block)
    weakref.finalize(array, _keep_spare, block).atexit = False
    return memoryview(array).cast("B")


def _take_spare(num_bytes: int) -> mmap.mmap | None:
    try:
        block = _spare.pop()
    except IndexError:
        return None
    # One of another size is given back to the system.
    return block if len(block) == num_bytes else None


def _keep_spare(block: mmap.mmap) -> None:
    _spare[:] = [block]


def _new(num_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
