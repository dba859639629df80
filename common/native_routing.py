"""Routing by the native kernels of common/native: where slots are computed, slots in that order, their rows.

Shapes: T tokens, K experts per token, R rows, D hidden_size, E experts, W workers, M most experts of one.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import compute_threads, native_library
from common.native.compiler import LIBRARY
from common.native_library import open_library

_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

Sorted = tuple[Tensor, Tensor, Tensor, Tensor]
"""The token of each row [R], the row of each slot [T, K], rows per key [W, M], and one past the last row of
each worker [W]."""


class NativeRouting:
    """The loaded library. Tensors are int64 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def place(self, topk_ids: Tensor, first_keys: Tensor) -> Tensor | None:  # [T, K], [E] -> [T, K]
        """Look up the key of every slot; None where an expert is not in the table, or its key is -1."""
        topk_ids, first_keys = topk_ids.contiguous(), first_keys.contiguous()
        keys = torch.empty(topk_ids.shape, dtype=torch.int64)
        failure = self._library.route_place(
            *(topk_ids.data_ptr(), topk_ids.numel(), first_keys.data_ptr(), first_keys.numel()),
            keys.data_ptr(),
        )
        return None if failure else keys

    def sort(self, slot_keys: Tensor, num_workers: int, most_local: int) -> Sorted | None:  # [T, K]
        """Sort slots by their keys, equal ones by token; None where a key is not below W * M."""
        slot_keys = slot_keys.contiguous()
        made, addresses = _room_for(slot_keys, num_workers, most_local)
        failure = self._library.route_sort(
            *(slot_keys.data_ptr(), slot_keys.numel(), max(slot_keys.shape[1], 1), num_workers, most_local),
            *addresses,
        )
        return None if failure else made

    def place_and_sort(
        self, topk_ids: Tensor, first_keys: Tensor, num_workers: int, most_local: int
    ) -> Sorted | None:  # [T, K], [E]
        """What `sort` makes of the keys that `place` finds; None where either gives None."""
        topk_ids, first_keys = topk_ids.contiguous(), first_keys.contiguous()
        made, addresses = _room_for(topk_ids, num_workers, most_local)
        failure = self._library.route_slots(
            *(topk_ids.data_ptr(), topk_ids.numel(), max(topk_ids.shape[1], 1)),
            *(first_keys.data_ptr(), first_keys.numel(), num_workers, most_local, *addresses),
        )
        return None if failure else made

    def write_rows(
        self,
        to: int,
        counts: Tensor,
        worker: int,
        num_local: int,
        first: int,
        span: tuple[int, int],
        token_of: Tensor,
        tokens: Tensor,
        scales: Tensor | None,
    ) -> None:
        """Write some rows of a worker to an address: rows per expert [num_local], their scales, themselves.

        Args:
            to: where there is room for them.
            counts: [W, M] rows per expert.
            worker: whose rows.
            num_local: how many experts it has.
            first: its first row.
            span: the first row to write, and one past the last.
            token_of: [R] the token of each row.
            tokens: [T, D].
            scales: [T] float32, or None.
        """
        begin, end = span
        self._library.route_write(
            *(compute_threads.count(), counts.data_ptr() + worker * counts.shape[1] * 8, num_local),
            *(token_of.data_ptr() + first * 8, begin - first, end - first),
            *(tokens.data_ptr(), tokens.shape[1] * tokens.itemsize),
            *(None if scales is None else scales.data_ptr(), to),
        )


def _room_for(slots: Tensor, num_workers: int, most_local: int) -> tuple[Sorted, tuple[int, ...]]:
    """What sorting fills in, and the addresses of it in the kernels' order."""
    counts = torch.empty(num_workers, most_local, dtype=torch.int64)
    ends = torch.empty(num_workers, dtype=torch.int64)
    token_of = torch.empty(slots.numel(), dtype=torch.int64)
    position_of = torch.empty(slots.shape, dtype=torch.int64)
    addresses = (counts.data_ptr(), ends.data_ptr(), token_of.data_ptr(), position_of.data_ptr())
    return (token_of, position_of, counts, ends), addresses


def load(library: Path = LIBRARY) -> NativeRouting:
    """Load the kernels from a built library. Raises ConfigError."""
    opened = open_library(library)
    opened.route_place.argtypes = [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER]
    opened.route_sort.argtypes = [_POINTER, *[_SIZE] * 4, *[_POINTER] * 4]
    opened.route_slots.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, *[_SIZE] * 3, *[_POINTER] * 4]
    opened.route_write.argtypes = [
        *(_NUMBER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER)
    ]
    return NativeRouting(opened)


@cache
def installed() -> NativeRouting | None:
    """Return the kernels beside this package, or None where they were not built."""
    return None if native_library.why_unavailable() else load()
