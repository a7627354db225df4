"""Memory that is used again: never while somebody still sees it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from foundry import buffers as memory
from foundry.buffers import allocate

PAGE = 4096


@pytest.fixture(autouse=True)
def nothing_spare() -> None:
    memory._spare.clear()


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def test_memory_is_aligned_to_pages_and_writable() -> None:
    view = allocate(3 * PAGE + 5)
    assert (len(view), view.format, view.readonly) == (3 * PAGE + 5, "B", False)
    assert address(view) % PAGE == 0
    assert len(allocate(0)) == 0


def test_what_went_is_used_for_the_next_of_its_size() -> None:
    view = allocate(8 * PAGE)
    where = address(view)
    assert address(allocate(8 * PAGE)) != where
    memory._spare.clear()
    del view
    assert address(allocate(8 * PAGE)) == where


def test_memory_is_not_used_again_while_a_view_or_a_tensor_of_it_is_there() -> None:
    view = allocate(8 * PAGE)
    where = address(view)
    tensor = torch.frombuffer(view, dtype=torch.float32)[5:]
    part = view[PAGE : 2 * PAGE]
    del view
    others = [allocate(8 * PAGE)]
    del part
    others.append(allocate(8 * PAGE))
    assert where not in {address(other) for other in others}
    tensor.zero_()
    del tensor
    assert address(allocate(8 * PAGE)) == where


def test_at_most_one_block_is_kept() -> None:
    views = [allocate(8 * PAGE) for _ in range(3)]
    views.clear()
    assert len(memory._spare) == 1
    allocate(9 * PAGE)
    assert [len(block) for block in memory._spare] == [9 * PAGE]
