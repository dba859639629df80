"""An arena hands out memory that is aligned, zeroed and nobody else's."""

from __future__ import annotations

from common.huge_pages import ALIGNMENT, HugePageArena


def test_tensors_of_one_arena_do_not_overlap_and_are_aligned() -> None:
    arena = HugePageArena(chunk_bytes=1 << 16)
    tensors = [arena.take(size) for size in (1, 63, 64, 65, 30_000, 30_000, 30_000, 200_000, 5)]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert not tensor.any()
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number + 1).all())


def test_small_tensors_share_a_chunk_and_outlive_their_arena() -> None:
    arena = HugePageArena(chunk_bytes=1 << 16)
    first, second = arena.take(100), arena.take(100)
    assert second.data_ptr() - first.data_ptr() == 128
    del arena, second
    first.fill_(7)
    assert int(first.sum()) == 700
