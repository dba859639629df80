"""Routing by the native kernels of common/native: where slots are computed, and slots in that order.

Shapes: T tokens, K experts per token, R rows, E experts, W workers, M most experts of one worker.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import native_library
from common.native.compiler import LIBRARY
from common.native_library import open_library

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


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

    def sort(
        self, slot_keys: Tensor, num_workers: int, most_local: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # [T, K] -> [R], [T, K], [W, M], [W]
        """Sort slots by their keys, equal ones by token; None where a key is not below W * M.

        Returns:
            The token of each row, the row of each slot, rows per key, and one past each worker's last row.
        """
        slot_keys = slot_keys.contiguous()
        top_k = max(slot_keys.shape[1], 1)
        counts = torch.empty(num_workers, most_local, dtype=torch.int64)
        ends = torch.empty(num_workers, dtype=torch.int64)
        token_of = torch.empty(slot_keys.numel(), dtype=torch.int64)
        position_of = torch.empty(slot_keys.shape, dtype=torch.int64)
        failure = self._library.route_sort(
            *(slot_keys.data_ptr(), slot_keys.numel(), top_k, num_workers, most_local),
            *(counts.data_ptr(), ends.data_ptr(), token_of.data_ptr(), position_of.data_ptr()),
        )
        return None if failure else (token_of, position_of, counts, ends)


def load(library: Path = LIBRARY) -> NativeRouting:
    """Load the kernels from a built library. Raises ConfigError."""
    opened = open_library(library)
    opened.route_place.argtypes = [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER]
    opened.route_sort.argtypes = [_POINTER, *[_SIZE] * 4, *[_POINTER] * 4]
    return NativeRouting(opened)


@cache
def installed() -> NativeRouting | None:
    """Return the kernels beside this package, or None where they were not built."""
    return None if native_library.why_unavailable() else load()
