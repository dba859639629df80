"""int8 rows times int8 weights (W8A8) by the native kernel of common/native, where it was built.

A row gets the same bits in every company, at every number of threads and on every processor: sums are exact
integers, and each float operation is one IEEE operation in a fixed order. Threads: torch's number.
Shapes: M rows, K in-features, N out-features, R rows, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError
from common.huge_pages import HugePageArena
from common.int8_reference import PackedInt8
from common.native.compiler import LIBRARY

VERSION = 1
PATHS = ("portable", "avx2", "avx512_vnni")
"""The ways through the kernel, in the order of their numbers there."""
MAX_IN_FEATURES = 131072
"""As many products of two int8 fit into an int32 sum."""


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
        wide = x.float().contiguous()
        rows, scales = torch.empty(wide.shape, dtype=torch.int8), torch.empty(wide.shape[0])
        self._library.int8_quantise(
            *(self._path, torch.get_num_threads(), wide.data_ptr(), *wide.shape),
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
        rows, row_scales = _checked_rows(rows, row_scales, packed)
        output = torch.empty(rows.shape[0], packed.view.n)
        failure = self._library.int8_linear(
            *(self._path, torch.get_num_threads(), rows.data_ptr(), row_scales.data_ptr(), rows.shape[0]),
            *(ctypes.byref(packed.view), output.data_ptr()),
        )
        if failure:
            raise MemoryError(f"no memory to multiply {rows.shape[0]} rows: send fewer at once")
        return output

    def int8_experts(
        self,
        rows: Tensor,
        row_scales: Tensor,
        tokens_per_expert: Tensor,
        gate_up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
    ) -> Tensor:  # [R, D] int8, [R] float32, [E_local], E_local x [2F, D], E_local x [D, F] -> [R, D] float32
        """Run rows, sorted by expert, through the experts of a layer, all of one shape, in one call.

        The bits are those of int8_linear, silu(gate) * up in float32, quantize_rows and int8_linear.

        Raises:
            ValueError: rows, scales, counts and weights do not belong together.
        """
        counts = tokens_per_expert.tolist()
        active = [expert for expert, count in enumerate(counts) if count]
        if (
            len(counts) != len(gate_up)
            or len(counts) != len(down)
            or sum(counts) != len(rows)
            or min(counts, default=0) < 0
        ):
            raise ValueError(
                f"tokens_per_expert {counts} must count {len(rows)} rows of {len(gate_up)} experts with "
                f"{len(down)} down projections"
            )
        if not active:
            return torch.empty(rows.shape)
        for expert in active:
            _check_expert(gate_up[expert], down[expert], gate_up[active[0]])
        rows, row_scales = _checked_rows(rows, row_scales, gate_up[active[0]])
        output = torch.empty(rows.shape)
        weights = (_Weight * (2 * len(active)))(
            *(packed.view for expert in active for packed in (gate_up[expert], down[expert]))
        )
        failure = self._library.int8_experts(
            *(self._path, torch.get_num_threads(), rows.data_ptr(), row_scales.data_ptr(), len(active)),
            *(
                (ctypes.c_int64 * len(active))(*(counts[expert] for expert in active)),
                weights,
                output.data_ptr(),
            ),
        )
        if failure:
            raise MemoryError(
                f"no memory to run {len(rows)} rows through {len(active)} experts: send fewer at once"
            )
        return output


def _checked_rows(rows: Tensor, row_scales: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor]:
    if (
        rows.dtype != torch.int8
        or row_scales.dtype != torch.float32
        or rows.shape != (len(row_scales), packed.view.k)
    ):
        raise ValueError(
            f"rows {list(rows.shape)} of {rows.dtype} with scales {list(row_scales.shape)} of "
            f"{row_scales.dtype} do not fit a weight [{packed.view.n}, {packed.view.k}]: give int8 "
            f"[M, {packed.view.k}] and float32 [M]"
        )
    return rows.contiguous(), row_scales.contiguous()


def _check_expert(gate_up: PackedWeight, down: PackedWeight, first: PackedWeight) -> None:
    size, hidden_size = first.view.n // 2, first.view.k
    shapes = (gate_up.view.n, gate_up.view.k, down.view.n, down.view.k)
    if shapes != (2 * size, hidden_size, hidden_size, size):
        raise ValueError(
            f"an expert with gate_up {list(shapes[:2])} and down {list(shapes[2:])} does not fit one with "
            f"gate_up [{first.view.n}, {hidden_size}]: all experts of a call are [2F, D] and [D, F]"
        )


def load(library: Path = LIBRARY, path: str | None = None) -> NativeInt8:
    """Load a built library.

    Args:
        library: the file.
        path: one of `available_paths`; None takes the best.

    Raises:
        ConfigError: the file is missing, cannot be loaded, or is of another version.
    """
    opened = _open(library)
    return NativeInt8(opened, path or PATHS[opened.int8_best_path()])


def available_paths(library: Path = LIBRARY) -> tuple[str, ...]:
    """Return the paths that this processor can take, the best one last."""
    return PATHS[: _open(library).int8_best_path() + 1]


def _open(library: Path) -> ctypes.CDLL:
    again = "install expertmesh again where g++ or clang++ is on PATH"
    if not library.exists():
        raise ConfigError(f"the native int8 kernel was not built ({library.name} is missing): {again}")
    try:
        # torch has loaded its OpenMP runtime by now, and the library finds that one: threads are shared.
        opened = ctypes.CDLL(str(library.resolve()))
        version = opened.int8_version()
    except (OSError, AttributeError) as error:
        raise ConfigError(f"the native int8 kernel cannot be loaded ({error}): {again}") from error
    if version != VERSION:
        raise ConfigError(f"the native int8 kernel has version {version} and not {VERSION}: {again}")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    opened.int8_packed_bytes.argtypes, opened.int8_packed_bytes.restype = [size, size], size
    opened.int8_pack.argtypes = [pointer, pointer, pointer, size, size, pointer]
    opened.int8_quantise.argtypes = [number, number, pointer, size, size, pointer, pointer]
    opened.int8_linear.argtypes = [number, number, pointer, pointer, size, pointer, pointer]
    opened.int8_experts.argtypes = [number, number, pointer, pointer, size, pointer, pointer, pointer]
    return opened


@cache
def _default() -> NativeInt8 | str:
    """Return the library beside this module, or why there is none; looked for once, at the first call."""
    try:
        return load()
    except ConfigError as error:
        return str(error)


def why_unavailable() -> str | None:
    """Return why the kernel cannot be used here, or None."""
    found = _default()
    return found if isinstance(found, str) else None


def is_available() -> bool:
    """Whether the kernel can be used here."""
    return why_unavailable() is None


def _kernel() -> NativeInt8:
    found = _default()
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [M, K] -> [M, K] int8, [M] float32
    """Quantise every row for itself, as `NativeInt8.quantize_rows` does."""
    return _kernel().quantize_rows(x)


def pack_int8(weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Lay a weight out for the kernel, as `NativeInt8.pack_int8` does."""
    return _kernel().pack_int8(weight, weight_scale, bias)


def int8_linear(rows: Tensor, row_scales: Tensor, packed: PackedWeight) -> Tensor:  # [M, K] -> [M, N]
    """Multiply int8 rows, as `NativeInt8.int8_linear` does."""
    return _kernel().int8_linear(rows, row_scales, packed)


def int8_experts(
    rows: Tensor,
    row_scales: Tensor,
    tokens_per_expert: Tensor,
    gate_up: Sequence[PackedWeight],
    down: Sequence[PackedWeight],
) -> Tensor:  # [R, D] -> [R, D]
    """Run rows through the experts of a layer, as `NativeInt8.int8_experts` does."""
    return _kernel().int8_experts(rows, row_scales, tokens_per_expert, gate_up, down)
