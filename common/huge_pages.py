"""Memory for weights that are read from front to back: huge pages, where the system gives them."""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64


class HugePageArena:
    """Cuts tensors from large chunks: weights share whole huge pages, and none is rounded up to one.

    With pages of 4 KiB, reading a weight once takes up to twice as long. A chunk is freed when no tensor of
    it lives; what was not cut from the last one yet takes no memory, for it was never touched.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:  # [num_bytes] uint8
        """Return zeroed memory that nobody else has, at a multiple of 64 bytes."""
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                self._chunk = _map(max(num_bytes, self._chunk_bytes))
                self._used = 0
            taken = self._chunk[self._used : self._used + num_bytes]
            self._used += num_bytes + -num_bytes % ALIGNMENT
            return taken


def _map(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may be built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
