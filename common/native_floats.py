"""Float kernels of common/native: linears, sums over slots, norms, SwiGLU, rotation, gate, attention.

A row gets the same bits in every company, at every number of threads and on every processor: each float
operation is one IEEE operation in a fixed order. Tensors are float32 or bfloat16.
Shapes: M rows, T tokens, N queries, H heads, C kv_lora_rank, R qk_rope_head_dim, E experts, D hidden_size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from common import compute_threads, native_library
from common.native.compiler import LIBRARY
from common.native_library import PATHS, best_path, open_library

BFLOAT16 = torch.bfloat16
TASK_OUTPUTS = 32
"""Outputs of `linear` that one thread computes at a time: their weights, widened, stay in its cache."""
_POINTER, _SIZE, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_THREE_SIZES, _FOUR_SIZES = _SIZE * 3, _SIZE * 4
_ARGUMENTS = {
    "float_rms_norm": [_NUMBER, _NUMBER, _NUMBER, _POINTER, *[_SIZE] * 3, _POINTER, _FLOAT, _POINTER],
    "float_swiglu": [_NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, *[_SIZE] * 4, _POINTER],
    "float_add_rms_norm": [
        *(_NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, _SIZE, _SIZE),
        *(_POINTER, _FLOAT, _POINTER),
    ],
    "float_add_routed": [_NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, _SIZE, _SIZE],
    "float_rotate_and_store": [
        *(_NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, *[_SIZE] * 4, _POINTER),
        *(_POINTER, _FLOAT, _POINTER, *[_POINTER] * 4),
    ],
    "float_sum_slots": [
        *(_NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, _SIZE, _SIZE),
        *(_POINTER, _POINTER, _SIZE, _SIZE, _NUMBER, _POINTER),
    ],
    "float_gate_logits": [_NUMBER, _NUMBER, _NUMBER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER],
    "float_per_head_linear": [
        *(_NUMBER, _NUMBER, _NUMBER, _POINTER, *[_SIZE] * 5),
        *(_POINTER, *[_SIZE] * 4, _POINTER),
    ],
    "float_absorbed_attention": [
        *(_NUMBER, _NUMBER, _NUMBER, _POINTER, *[_SIZE] * 3, _POINTER, _SIZE, _POINTER),
        *(_POINTER, *[_SIZE] * 3, _POINTER, _SIZE, _POINTER, _FLOAT, _POINTER),
    ],
    "float_prompt_attention": [
        *(_NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER, _POINTER, *[_SIZE] * 5),
        *(_POINTER, _FLOAT, _POINTER),
    ],
}


class NativeFloats:
    """The loaded library, and the path through it that is taken."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._library = library
        self._path = PATHS.index(path)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [M, D], [D] -> [M, D]
        """Scale rows to unit root mean square in float32, round, then apply the weight."""
        x = _rows(x)
        output = torch.empty(x.shape, dtype=x.dtype)
        self._library.float_rms_norm(
            *(
                self._path,
                compute_threads.count(),
                _is_bfloat16(x, weight),
                x.data_ptr(),
                *x.shape,
                x.stride(0),
            ),
            *(weight.data_ptr(), eps, output.data_ptr()),
        )
        return output

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:  # 2 x [M, F] -> [M, F]
        """Return silu(gate) * up, computed in float32 and rounded once."""
        gate, up = _rows(gate), _rows(up)
        output = torch.empty(gate.shape, dtype=gate.dtype)
        self._library.float_swiglu(
            *(self._path, compute_threads.count(), _is_bfloat16(gate, up), gate.data_ptr(), up.data_ptr()),
            *(*gate.shape, gate.stride(0), up.stride(0), output.data_ptr()),
        )
        return output

    def add_rms_norm(self, residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add the update to the residual, in place, and normalise that: 2 x [M, D], [D] -> [M, D]."""
        update = update.contiguous()
        output = torch.empty(residual.shape, dtype=residual.dtype)
        _check_in_place(residual, update.shape)
        self._library.float_add_rms_norm(
            *(self._path, compute_threads.count(), _is_bfloat16(residual, update, weight)),
            *(residual.data_ptr(), update.data_ptr(), *residual.shape),
            *(weight.data_ptr(), eps, output.data_ptr()),
        )
        return output

    def add_routed(self, shared: Tensor, routed: Tensor) -> Tensor:  # [M, D], [M, D] float32 -> [M, D]
        """Add to what shared experts made, in place, and round once."""
        routed = routed.contiguous()
        _check_in_place(shared, routed.shape)
        self._library.float_add_routed(
            *(self._path, compute_threads.count(), _is_bfloat16(shared), shared.data_ptr()),
            *(routed.data_ptr(), *shared.shape),
        )
        return shared

    def rotate_and_store(
        self,
        q: Tensor,
        latents: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Give queries and keys their positions, and normalised latents with these keys to the cache.

        Args:
            q: [T, H, nope + R], of which the last R elements of each head are turned in place.
            latents: [T, C + R], kv_c and k_pe as they were projected.
            norm_weight: [C], and the bias that follows it, or none.
            cos: [T, R / 2] float32, like sin.
            cache: [blocks, block_size, C + R].
            slot_mapping: [T] int64.
        """
        latents, cos, sin, slots = (
            _rows(latents),
            cos.contiguous(),
            sin.contiguous(),
            slot_mapping.contiguous(),
        )
        num_tokens, num_heads, q_size = q.shape
        num_latents = norm_weight.shape[0]
        num_rotary = latents.shape[1] - num_latents
        self._library.float_rotate_and_store(
            *(self._path, compute_threads.count(), _is_bfloat16(q, latents, cache, norm_weight)),
            q.data_ptr() + (q_size - num_rotary) * q.element_size(),
            *(latents.data_ptr(), num_tokens, num_heads, num_latents, num_rotary),
            _THREE_SIZES(*q.stride()[:2], latents.stride(0)),
            *(norm_weight.data_ptr(), eps, None if norm_bias is None else norm_bias.data_ptr()),
            *(cos.data_ptr(), sin.data_ptr(), cache.data_ptr(), slots.data_ptr()),
        )

    def sum_slots(
        self, parts: Sequence[Tensor], position_of: Tensor, topk_weights: Tensor, dtype: torch.dtype
    ) -> Tensor:  # one or more [rows of it, D], [T, K] int64, [T, K] float32 -> [T, D] float32 or float64
        """Add up the rows of every token: products rounded in float32, added in slot order in float64.

        Rows are counted through all parts; a position beyond them adds nothing.
        """
        parts = [part.contiguous() for part in parts]
        position_of, topk_weights = position_of.contiguous(), topk_weights.contiguous()
        size, num_parts = parts[0].shape[1], len(parts)
        if any(part.shape[1] != size for part in parts):
            raise ValueError(
                f"rows of {[part.shape[1] for part in parts]} elements cannot be added up together"
            )
        output = torch.empty(position_of.shape[0], size, dtype=dtype)
        self._library.float_sum_slots(
            *(self._path, compute_threads.count(), _is_bfloat16(*parts)),
            (_POINTER * num_parts)(*(part.data_ptr() for part in parts)),
            (_SIZE * num_parts)(*accumulate(part.shape[0] for part in parts)),
            *(num_parts, size, position_of.data_ptr(), topk_weights.data_ptr(), *position_of.shape),
            *(dtype == torch.float64, output.data_ptr()),
        )
        return output

    def gate_logits(self, x: Tensor, weight: Tensor) -> Tensor:  # [T, D], [E, D] float32 -> [T, E] float32
        """Multiply rows by the gate's weight in float32."""
        x, weight = x.contiguous(), weight.contiguous()
        output = torch.empty(x.shape[0], weight.shape[0])
        failure = self._library.float_gate_logits(
            *(self._path, compute_threads.count(), _is_bfloat16(x), x.data_ptr(), *x.shape),
            *(weight.data_ptr(), weight.shape[0], output.data_ptr()),
        )
        _check(failure, x.shape[0])
        return output

    def per_head_linear(self, x: Tensor, weight: Tensor) -> Tensor:  # [T, H, I], [H, O, I] -> [T, H, O]
        """Multiply the rows of every head by that head's weight, which may be a view."""
        x = x if x.stride(2) == 1 else x.contiguous()
        weight = weight if 1 in weight.stride()[1:] else weight.contiguous()
        output = torch.empty(x.shape[0], x.shape[1], weight.shape[1], dtype=x.dtype)
        failure = self._library.float_per_head_linear(
            *(self._path, compute_threads.count(), _is_bfloat16(x, weight), x.data_ptr(), *x.shape),
            *(x.stride(0), x.stride(1), weight.data_ptr(), weight.shape[1], *weight.stride()),
            output.data_ptr(),
        )
        _check(failure, x.shape[0])
        return output

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:  # [M, K], [N, K] -> [M, N]
        """Multiply rows by a weight, adding up in float32 and rounding once.

        Raises:
            ValueError: they are of other dtypes than float32 or bfloat16, or do not belong together.
        """
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(
                f"rows {list(x.shape)} cannot be multiplied by a weight {list(weight.shape)}: "
                "give [M, K] and [N, K]"
            )
        # Some outputs at a time, like heads that all have the same rows: so many are one task.
        num_out = weight.shape[0]
        num_whole = num_out // TASK_OUTPUTS * TASK_OUTPUTS
        products = []
        for part, size in ((weight[:num_whole], TASK_OUTPUTS), (weight[num_whole:], num_out - num_whole)):
            if len(part):
                heads = part.reshape(-1, size, part.shape[1])
                shared = x.unsqueeze(1).expand(-1, len(heads), -1)
                products.append(self.per_head_linear(shared, heads).view(x.shape[0], len(part)))
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def absorbed_attention(
        self,
        q: Tensor,
        kv_b: Tensor,
        cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
    ) -> Tensor:  # [N, H, nope + R], [H, nope + v, C], [blocks, block_size, C + R], [N, n], [N] -> [N, H, v]
        """Attend to cached latents in their space, without reading any other slot.

        Queries and results are rounded to their dtype on the way into that space and out of it.
        """
        q = q if q.stride(2) == 1 else q.contiguous()
        kv_b = kv_b if kv_b.stride(2) == 1 else kv_b.contiguous()
        block_tables, context_lens = block_tables.contiguous(), context_lens.contiguous()
        num_queries, num_heads, q_size = q.shape
        _, num_lines, num_latents = kv_b.shape
        _, block_size, width = cache.shape
        num_nope = q_size - (width - num_latents)
        num_out = num_lines - num_nope
        output = torch.empty(num_queries, num_heads, num_out, dtype=q.dtype)
        failure = self._library.float_absorbed_attention(
            *(self._path, compute_threads.count(), _is_bfloat16(q, kv_b, cache)),
            *(q.data_ptr(), num_queries, num_heads, num_nope, kv_b.data_ptr(), num_out),
            _FOUR_SIZES(*q.stride()[:2], *kv_b.stride()[:2]),
            *(cache.data_ptr(), block_size, num_latents, width - num_latents),
            *(block_tables.data_ptr(), block_tables.shape[1], context_lens.data_ptr(), scale),
            output.data_ptr(),
        )
        _check(failure, num_queries)
        return output

    def prompt_attention(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float
    ) -> Tensor:  # [T, H, Dq], [S, H, Dq], [S, H, Dv] -> [T, H, Dv]
        """Attend within one sequence; query i stands at position start + i and sees keys 0 ... start + i."""
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        output = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
        strides = [x.stride(dim) for x in (q, k, v) for dim in (0, 1)]
        failure = self._library.float_prompt_attention(
            *(self._path, compute_threads.count(), _is_bfloat16(q, k, v)),
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.shape, v.shape[2], start),
            *((_SIZE * len(strides))(*strides), scale, output.data_ptr()),
        )
        _check(failure, len(q))
        return output


def load(library: Path = LIBRARY, path: str | None = None) -> NativeFloats:
    """Load the kernels from a built library; `path` as in `native_int8.load`. Raises ConfigError."""
    opened = open_library(library)
    for name, arguments in _ARGUMENTS.items():
        getattr(opened, name).argtypes = arguments
    return NativeFloats(opened, path or best_path(opened))


@cache
def installed() -> NativeFloats | None:
    """Return the kernels beside this package, or None where they were not built."""
    return None if native_library.why_unavailable() else load()


def _check_in_place(x: Tensor, shape: torch.Size) -> None:
    """Refuse what cannot be added to where it lies."""
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{list(shape)} cannot be added to {list(x.shape)} in place: give one shape, without gaps"
        )


def _rows(x: Tensor) -> Tensor:
    """Return rows whose elements are neighbours; the rows themselves need not be."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _is_bfloat16(*tensors: Tensor) -> bool:
    """Which of the two dtypes all of these have: the kernels get addresses, and cannot see it."""
    dtype = tensors[0].dtype
    is_bfloat16 = dtype is BFLOAT16
    if (is_bfloat16 or dtype is torch.float32) and all(tensor.dtype is dtype for tensor in tensors[1:]):
        return is_bfloat16
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    raise ValueError(
        f"tensors of {', '.join(dtypes)} cannot be computed together: give float32 or bfloat16 alone"
    )


def _check(failure: int, num_rows: int) -> None:
    if failure:
        raise MemoryError(f"no memory to compute {num_rows} rows: send fewer at once")
