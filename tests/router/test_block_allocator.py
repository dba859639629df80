"""KV blocks: none is lost, none is handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.block_allocator import BlockAllocator


@given(st.integers(0, 20), st.lists(st.integers(-10, 10), max_size=60))
def test_no_block_is_shared_or_lost_whatever_is_taken_and_given_back(
    num_blocks: int, steps: list[int]
) -> None:
    allocator = BlockAllocator(num_blocks)
    held: list[int] = []
    for step in steps:
        if step >= 0 and step <= allocator.num_free:
            held += allocator.allocate(step)
        elif step < 0:
            returned, held = held[:-step], held[-step:]
            allocator.free(returned)
        assert len(set(held)) == len(held) == allocator.num_used
        assert set(held) <= set(range(num_blocks))
        assert allocator.num_free == num_blocks - len(held)


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    allocator = BlockAllocator(3)
    allocator.allocate(1)
    with pytest.raises(ValueError, match="3 KV blocks were asked for and 2 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


def test_a_block_that_nobody_holds_cannot_be_given_back() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(ValueError, match="nobody held it"):
        allocator.free(blocks)


def test_memory_that_was_never_needed_stays_untouched() -> None:
    allocator = BlockAllocator(1000)
    for _ in range(50):
        blocks = allocator.allocate(3)
        assert max(blocks) < 3
        allocator.free(blocks)
