"""A number in memory that a parent shares with its child: the child counts, the parent looks. Torch-free."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

SIZE = mmap.PAGESIZE


class ProgressCounter:
    """Counts in memory both processes map, so that a parent can look while its child computes or is stopped.

    Owned by the parent; one thread of the child counts.
    """

    def __init__(self, fd: int) -> None:
        """Map the counter behind `fd`, which stays open as long as this object lives."""
        self.fd = fd
        self._memory = mmap.mmap(fd, SIZE)
        self._count = memoryview(self._memory).cast("Q")

    @classmethod
    def create(cls) -> ProgressCounter:
        """Make a counter at zero."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("progress")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, SIZE)
        return cls(fd)

    @property
    def count(self) -> int:
        """How often the child moved on."""
        return self._count[0]

    @property
    def address(self) -> int:
        """Where the count is, for code that has no Python; until `close`."""
        return ctypes.addressof(ctypes.c_uint64.from_buffer(self._memory))

    def tick(self) -> None:
        """Move on."""
        self._count[0] += 1

    def close(self) -> None:
        """Give the memory back."""
        self._count.release()
        self._memory.close()
        os.close(self.fd)
