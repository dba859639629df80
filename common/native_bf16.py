"""bfloat16 rows times bfloat16 weights by the native kernel, where the processor has AVX-512 BF16.

A row gets the same bits in every company and at every number of threads, since all numbers of rows add in one
order; another processor may round otherwise. Weights are read where they are.
Shapes: M rows, K in-features, N out-features, R rows, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import compute_threads, native_library
from common.expert_counts import counted_experts
from common.native.compiler import LIBRARY
from common.native_library import open_library
from common.output_memory import output_memory

logger = logging.getLogger(__name__)


class _Weight(ctypes.Structure):
    """The kernel's view of a weight."""

    _fields_ = (("rows", ctypes.c_void_p), ("k", ctypes.c_int64), ("n", ctypes.c_int64))


class NativeBf16:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:  # [M, K], [N, K] -> [M, N]
        """Multiply rows by a weight, adding up in float32 and rounding once.

        Raises:
            ValueError: they are not bfloat16, do not belong together, or the weight is not contiguous.
        """
        _check_rows(x, weight)
        x = x.contiguous()
        output = x.new_empty(x.shape[0], weight.shape[0])
        failure = self._library.bf16_linear(
            *(compute_threads.count(), x.data_ptr(), x.shape[0], ctypes.byref(_view(weight))),
            output.data_ptr(),
        )
        if failure:
            raise MemoryError(f"no memory to multiply {x.shape[0]} rows: send fewer at once")
        return output

    def experts(
        self,
        rows: Tensor,
        tokens_per_expert: Tensor,
        gate_up: Sequence[Tensor],
        down: Sequence[Tensor],
        out: Tensor | None = None,
    ) -> Tensor:  # [R, D], [E_local], E_local x [2F, D], E_local x [D, F] -> [R, D]
        """Run rows, sorted by expert, through the experts of a layer, all of one shape, in one call.

        The bits are those of `linear`, `NativeFloats.swiglu` and `linear`. They are written to `out` [R, D]
        where it is given.

        Raises:
            ValueError: rows, counts, weights and `out` do not belong together, or as for `linear`.
        """
        counts, active = counted_experts(tokens_per_expert, len(rows), gate_up, down)
        output = output_memory(rows, rows.dtype, out)
        if not active:
            return output
        rows = rows.contiguous()
        for expert in active:
            _check_expert(rows, gate_up[expert], down[expert], gate_up[active[0]])
        failure = self._library.bf16_experts(
            *(compute_threads.count(), rows.data_ptr(), len(active)),
            (ctypes.c_int64 * len(active))(*(counts[expert] for expert in active)),
            (_Weight * (2 * len(active)))(
                *(_view(weight) for expert in active for weight in (gate_up[expert], down[expert]))
            ),
            output.data_ptr(),
        )
        if failure:
            raise MemoryError(
                f"no memory to run {len(rows)} rows through {len(active)} experts: send fewer at once"
            )
        return output


def _view(weight: Tensor) -> _Weight:
    return _Weight(weight.data_ptr(), weight.shape[1], weight.shape[0])


def _check_rows(x: Tensor, weight: Tensor) -> None:
    if (
        x.dtype != torch.bfloat16
        or weight.dtype != torch.bfloat16
        or x.dim() != 2
        or weight.dim() != 2
        or x.shape[1] != weight.shape[1]
        or not weight.numel()
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"rows {list(x.shape)} of {x.dtype} cannot be multiplied by a weight {list(weight.shape)} of "
            f"{weight.dtype} with strides {list(weight.stride())}: give bfloat16 [M, K] and [N, K], "
            f"the weight contiguous and not empty"
        )


def _check_expert(rows: Tensor, gate_up: Tensor, down: Tensor, first: Tensor) -> None:
    _check_rows(rows, gate_up)
    size, hidden_size = first.shape[0] // 2, first.shape[1]
    if gate_up.shape != (2 * size, hidden_size) or down.shape != (hidden_size, size):
        raise ValueError(
            f"an expert with gate_up {list(gate_up.shape)} and down {list(down.shape)} does not fit one with "
            f"gate_up {list(first.shape)}: all experts of a call are [2F, D] and [D, F]"
        )
    if down.dtype != torch.bfloat16 or not down.is_contiguous():
        raise ValueError(
            f"a down projection of {down.dtype} with strides {list(down.stride())} cannot be read: give a "
            "contiguous one of bfloat16"
        )


def why_unavailable() -> str | None:
    """Return why the installed kernel cannot be used here, or None."""
    why = native_library.why_unavailable()
    if why is None and not open_library().bf16_is_available():
        return "this processor has no AVX-512 BF16"
    return why


def load(library: Path = LIBRARY) -> NativeBf16:
    """Load the kernel from a built library; where `why_unavailable` returns a reason, it must not be called.

    Raises:
        ConfigError: the file is missing, cannot be loaded, or is of another version.
    """
    opened = open_library(library)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    opened.bf16_linear.argtypes = [number, pointer, size, pointer, pointer]
    opened.bf16_experts.argtypes = [number, pointer, size, pointer, pointer, pointer]
    return NativeBf16(opened)


@cache
def installed() -> NativeBf16 | None:
    """Return the kernel beside this package, or None where it cannot be used."""
    why = why_unavailable()
    if why is not None:
        logger.info("the native bfloat16 kernel is not used: %s", why)
        return None
    return load()
