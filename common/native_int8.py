"""int8 rows times int8 weights (W8A8) by the native kernel of common/native, where it was built.

A row gets the same bits in every company, at every number of threads and on every processor: sums are exact
integers, and each float operation is one IEEE operation in a fixed order.
Shapes: M rows, K in-features, N out-features, R rows, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import compute_threads
from common.huge_pages import HugePageArena
from common.int8_reference import PackedInt8
from common.native.compiler import LIBRARY
from common.native_library import PATHS, best_path, open_library
from common.output_memory import output_memory

MAX_IN_FEATURES = 131072
"""As many products of two int8 fit into an int32 sum."""
WRONG_COUNTS = 2
"""What the kernel returns where rows per expert are not those of the rows."""


class _Weight(ctypes.Structure):
    """The kernel's view of a packed weight."""

    _fields_ = (("blocks", ctypes.c_void_p), ("k", ctypes.c_int64), ("n", ctypes.c_int64))


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight(PackedInt8):
    """A weight as the kernel reads it; made by `pack_int8`, of no use to anything else.

    Its one part is [bytes] uint8: per 16 out-features the weights, the scales and the bias.

    Attributes:
        view: its address and sizes.
    """

    view: _Weight


@dataclass(frozen=True, slots=True, eq=False)
class JoinedExperts:
    """The experts of a layer as one call reads them; made by `join_experts`.

    Attributes:
        weights: the views of gate_up and down of expert 0, of expert 1, ...
        hidden_size: D.
        packed: owns what the views point at.
    """

    weights: ctypes.Array[_Weight]
    num_experts: int
    hidden_size: int
    packed: tuple[PackedInt8, ...]


class NativeInt8:
    """The loaded library, and the path through it that is taken. Owns the memory it packs weights in."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._library = library
        self._path = PATHS.index(path)
        self._arena = HugePageArena()

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [M, K] -> [M, K] int8, [M] float32
        """Quantise every row for itself: scale = max|x| / 127, rows = round(x / scale), halves to even.

        A row that is not finite gets zeros and a scale that is not finite.
        """
        is_bfloat16 = x.dtype is torch.bfloat16
        x = x.contiguous() if is_bfloat16 else x.float().contiguous()
        rows, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
        self._library.int8_quantise(
            *(self._path, compute_threads.count(), is_bfloat16, x.data_ptr(), *x.shape),
            *(rows.data_ptr(), scales.data_ptr()),
        )
        return rows, scales

    def pack_int8(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> PackedWeight:
        """Lay a weight out for the kernel: [N, K] int8, [N] float32, [N] int32 or None; none is kept.

        Raises:
            ValueError: the shapes or dtypes are others, or a sum of K products may not fit into an int32.
        """
        num_out, num_in = weight.shape
        if weight.dtype != torch.int8 or weight_scale.shape != (num_out,) or num_in > MAX_IN_FEATURES:
            raise ValueError(
                f"a weight {list(weight.shape)} of {weight.dtype} with scales {list(weight_scale.shape)} "
                f"cannot be packed: give int8 [N, K] with K at most {MAX_IN_FEATURES}, and scales [N]"
            )
        weight, weight_scale = weight.contiguous(), weight_scale.float().contiguous()
        bias = None if bias is None else bias.to(torch.int32).contiguous()
        blocks = self._arena.take(self._library.int8_packed_bytes(num_out, num_in))
        self._library.int8_pack(
            *(weight.data_ptr(), weight_scale.data_ptr(), None if bias is None else bias.data_ptr()),
            *(num_out, num_in, blocks.data_ptr()),
        )
        return PackedWeight((blocks,), weight_scale, bias, _Weight(blocks.data_ptr(), num_in, num_out))

    def int8_linear(self, rows: Tensor, row_scales: Tensor, packed: PackedWeight) -> Tensor:
        """Multiply int8 rows: [M, K] int8, [M] float32 -> [M, N] float32.

        sums = rows x weight + bias in int32, exactly; result = float32(sums) * weight_scale * row_scale, in
        this order.

        Raises:
            ValueError: rows, scales and weight do not belong together.
        """
        rows, row_scales = _checked_rows(rows, row_scales, packed.view.k)
        output = torch.empty(rows.shape[0], packed.view.n)
        failure = self._library.int8_linear(
            *(self._path, compute_threads.count(), rows.data_ptr(), row_scales.data_ptr(), rows.shape[0]),
            *(ctypes.byref(packed.view), output.data_ptr()),
        )
        if failure:
            raise MemoryError(f"no memory to multiply {rows.shape[0]} rows: send fewer at once")
        return output

    def quantizing_linear(self, x: Tensor, packed: PackedWeight) -> Tensor:  # [M, K] -> [M, N]
        """Quantise rows of float32 or bfloat16, multiply them, and round to their dtype, in one call.

        Raises:
            ValueError: rows and weight do not belong together.
        """
        x = _checked_floats(x, packed)
        output = x.new_empty(x.shape[0], packed.view.n)
        failure = self._library.int8_quantising_linear(
            *(self._path, compute_threads.count(), x.dtype == torch.bfloat16, x.data_ptr(), x.shape[0]),
            *(ctypes.byref(packed.view), output.data_ptr()),
        )
        if failure:
            raise MemoryError(f"no memory to multiply {x.shape[0]} rows: send fewer at once")
        return output

    def mlp(self, x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:  # [M, D] -> [M, D]
        """Run rows of float32 or bfloat16 through one SwiGLU: gate_up [2F, D] and down [D, F].

        The bits are those of `int8_experts` with quantised rows, rounded to the dtype of x.

        Raises:
            ValueError: rows and weights do not belong together.
        """
        _check_expert(gate_up.view, down.view, gate_up.view)
        x = _checked_floats(x, gate_up)
        output = torch.empty_like(x)
        failure = self._library.int8_mlp(
            *(self._path, compute_threads.count(), x.dtype == torch.bfloat16, x.data_ptr(), x.shape[0]),
            *((_Weight * 2)(gate_up.view, down.view), output.data_ptr()),
        )
        if failure:
            raise MemoryError(f"no memory to run {x.shape[0]} rows: send fewer at once")
        return output

    def join_experts(self, gate_up: Sequence[PackedInt8], down: Sequence[PackedInt8]) -> JoinedExperts:
        """Put the experts of a layer together for `int8_experts`: gate_up [2F, D] and down [D, F] of each.

        Raises:
            ValueError: there is none, they are not all of one shape, or another backend has packed them.
        """
        pairs = [*zip(gate_up, down, strict=True)]
        views = [one.view for pair in pairs for one in pair if isinstance(one, PackedWeight)]
        if not pairs or len(views) != 2 * len(pairs):
            raise ValueError(f"{len(views)} of {2 * len(pairs)} weights can be joined: pack all of them here")
        for index in range(0, len(views), 2):
            _check_expert(views[index], views[index + 1], views[0])
        return JoinedExperts((_Weight * len(views))(*views), len(pairs), views[0].k, (*gate_up, *down))

    def int8_experts(
        self,
        rows: Tensor,
        row_scales: Tensor,
        tokens_per_expert: Tensor,
        joined: JoinedExperts,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:  # [R, D] int8, [R] float32, [E_local] int64 -> [R, D]
        """Run rows, sorted by expert, through the experts of a layer in one call.

        The bits are those of int8_linear, silu(gate) * up in float32, quantize_rows and int8_linear, rounded
        to `dtype`, which is float32 or bfloat16. They are written to `out` [R, D] where it is given.

        Raises:
            ValueError: rows, scales, counts, weights and `out` do not belong together.
        """
        rows, row_scales = _checked_rows(rows, row_scales, joined.hidden_size)
        if tokens_per_expert.shape != (joined.num_experts,) or tokens_per_expert.dtype != torch.int64:
            raise ValueError(
                f"tokens_per_expert {list(tokens_per_expert.shape)} of {tokens_per_expert.dtype} must be "
                f"int64 [{joined.num_experts}]"
            )
        counts = tokens_per_expert.contiguous()
        output = output_memory(rows, dtype, out)
        failure = self._library.int8_experts(
            *(self._path, compute_threads.count(), rows.data_ptr(), row_scales.data_ptr(), len(rows)),
            *(joined.num_experts, counts.data_ptr(), joined.weights, dtype == torch.bfloat16),
            output.data_ptr(),
        )
        if failure == WRONG_COUNTS:
            raise ValueError(f"tokens_per_expert {counts.tolist()} does not count {len(rows)} rows")
        if failure:
            raise MemoryError(f"no memory to run {len(rows)} rows through their experts: send fewer at once")
        return output


def _checked_rows(rows: Tensor, row_scales: Tensor, num_in: int) -> tuple[Tensor, Tensor]:
    if (
        rows.dtype != torch.int8
        or row_scales.dtype != torch.float32
        or rows.shape != (len(row_scales), num_in)
    ):
        raise ValueError(
            f"rows {list(rows.shape)} of {rows.dtype} with scales {list(row_scales.shape)} of "
            f"{row_scales.dtype} do not fit weights of {num_in} in-features: give int8 [M, {num_in}] and "
            "float32 [M]"
        )
    return rows.contiguous(), row_scales.contiguous()


def _checked_floats(x: Tensor, packed: PackedWeight) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2 or x.shape[1] != packed.view.k:
        raise ValueError(
            f"rows {list(x.shape)} of {x.dtype} do not fit a weight [{packed.view.n}, {packed.view.k}]: give "
            f"float32 or bfloat16 [M, {packed.view.k}]"
        )
    return x.contiguous()


def _check_expert(gate_up: _Weight, down: _Weight, first: _Weight) -> None:
    size, hidden_size = first.n // 2, first.k
    shapes = (gate_up.n, gate_up.k, down.n, down.k)
    if shapes != (2 * size, hidden_size, hidden_size, size):
        raise ValueError(
            f"an expert with gate_up {list(shapes[:2])} and down {list(shapes[2:])} does not fit one with "
            f"gate_up [{first.n}, {hidden_size}]: all experts of a call are [2F, D] and [D, F]"
        )


def load(library: Path = LIBRARY, path: str | None = None) -> NativeInt8:
    """Load the kernel from a built library.

    Args:
        library: the file.
        path: one of `native_library.available_paths`; None takes the best.

    Raises:
        ConfigError: the file is missing, cannot be loaded, or is of another version.
    """
    opened = open_library(library)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    opened.int8_packed_bytes.argtypes, opened.int8_packed_bytes.restype = [size, size], size
    opened.int8_pack.argtypes = [pointer, pointer, pointer, size, size, pointer]
    opened.int8_quantise.argtypes = [number, number, number, pointer, size, size, pointer, pointer]
    opened.int8_linear.argtypes = [number, number, pointer, pointer, size, pointer, pointer]
    opened.int8_quantising_linear.argtypes = [number, number, number, pointer, size, pointer, pointer]
    opened.int8_mlp.argtypes = [number, number, number, pointer, size, pointer, pointer]
    opened.int8_experts.argtypes = [
        *(number, number, pointer, pointer, size, size, pointer, pointer, number, pointer)
    ]
    return NativeInt8(opened, path or best_path(opened))
