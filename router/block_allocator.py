"""Hands out the KV blocks of the cache and takes them back. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """The free blocks, numbered 0 to num_blocks - 1. Owned by the scheduler.

    What was freed last is handed out first, so that memory nobody needed yet stays untouched.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks.

        Raises:
            ValueError: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise ValueError(f"{count} KV blocks were asked for and {len(self._free)} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_held[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: a block is not held.
        """
        for block in blocks:
            if not self._is_held[block]:
                raise ValueError(f"KV block {block} was given back and nobody held it")
            self._is_held[block] = 0
            self._free.append(block)
