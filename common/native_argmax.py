"""The greatest number of each row by the native kernel of common/native: torch.argmax, at memory speed.

The same ids on every path and at every number of threads. Shapes: B rows, V numbers of a row.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import compute_threads, native_library
from common.native.compiler import LIBRARY
from common.native_library import PATHS, best_path, open_library

DTYPES = (torch.float32, torch.bfloat16)
_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class NativeArgmax:
    """The loaded library, and the path through it that is taken. Tensors are on the CPU."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._find = library.argmax_of_rows
        self._path = PATHS.index(path)

    def find(self, x: Tensor) -> tuple[list[int], list[bool]]:  # [B, V] -> 2 x [B]
        """Find each row's greatest, the first of equals or the first NaN, and say whether it is finite.

        Raises:
            ValueError: there are no numbers in a row, or not float32 or bfloat16.
        """
        if x.dtype not in DTYPES or x.dim() != 2 or not x.shape[1]:
            raise ValueError(f"{x.dtype} {list(x.shape)} has no argmax: give [B, V] of float32 or bfloat16")
        if x.stride(1) != 1:
            x = x.contiguous()
        # Arrays: to make tensors and lists of them takes longer than to look through a row.
        ids, is_finite = (_SIZE * len(x))(), (ctypes.c_bool * len(x))()
        failure = self._find(
            *(self._path, compute_threads.count(), x.dtype is torch.bfloat16, x.data_ptr(), *x.shape),
            *(x.stride(0), ids, is_finite),
        )
        if failure:
            raise MemoryError(f"no memory to compare {len(x)} rows of logits: send fewer at once")
        return list(ids), list(is_finite)


def load(library: Path = LIBRARY, path: str | None = None) -> NativeArgmax:
    """Load the kernel from a built library; `path` as in `native_int8.load`. Raises ConfigError."""
    opened = open_library(library)
    opened.argmax_of_rows.argtypes = [*[_NUMBER] * 3, _POINTER, *[_SIZE] * 3, _POINTER, _POINTER]
    return NativeArgmax(opened, path or best_path(opened))


@cache
def installed() -> NativeArgmax | None:
    """Return the kernel beside this package, or None where it was not built."""
    return None if native_library.why_unavailable() else load()
