"""The router's operations on a CPU, each row-invariant: by the native kernels where they were built.

Shapes: T tokens, N tokens on the decode path, H heads, C kv_lora_rank, R qk_rope_head_dim, E experts,
K experts per token, D hidden_size.
"""

from __future__ import annotations

from torch import Tensor

from common import native_gate, rows
from common.cpu_linear import linear
from common.int8_rows import (
    int8_linear,
    int8_mlp,
    pack_int8,
    quantize_rows,
    quantize_rows_static,
    quantizing_linear,
)
from common.model_config import ModelConfig
from common.native_floats import installed
from router.kernels import gate, reference, tiled_attention
from router.kernels.reference import gather_latents

__all__ = [
    "absorbed_attention",
    "choose_experts",
    "gate_logits",
    "gather_latents",
    "int8_linear",
    "int8_mlp",
    "linear",
    "mlp_rows",
    "pack_int8",
    "prefill_attention",
    "quantize_rows",
    "quantize_rows_static",
    "quantizing_linear",
    "rms_norm",
    "rotate",
    "store_latents",
    "swiglu",
]

MLP_ELEMENTS = 3 << 20
"""Most elements of gate, of up and of their product: 6 MiB each in bfloat16."""
LEAST_MLP_ROWS = 64
"""Rows an MLP is given in any case: fewer take longer for each."""


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:  # [T, D], [E, D] float32 -> [T, E] float32
    """Multiply every row by the gate's weight, in float32."""
    native = installed()
    return rows.linear(x.float(), weight) if native is None else native.gate_logits(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [T, D], [D] -> [T, D]
    """Scale every row to unit root mean square in float32, round, then apply the weight."""
    native = installed()
    return rows.rms_norm(x, weight, eps) if native is None else native.rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # 2 x [T, F] -> [T, F]
    """Return silu(gate) * up, computed in float32 and rounded once."""
    native = installed()
    return rows.swiglu(gate, up) if native is None else native.swiglu(gate, up)


def mlp_rows(num_rows: int, intermediate_size: int) -> int:
    """Bound what lies between an MLP's weights: the activations of fewer rows, where they are wide."""
    fitting = MLP_ELEMENTS // intermediate_size // LEAST_MLP_ROWS * LEAST_MLP_ROWS
    return max(min(num_rows, fitting), LEAST_MLP_ROWS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H, R], 2 x [T, R/2] -> [T, H, R]
    """Turn each pair of neighbours by its angle."""
    native = installed()
    return reference.rotate(x, cos, sin) if native is None else native.rotate(x, cos, sin)


def choose_experts(
    logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:  # [T, E], [E] -> [T, K] int64, [T, K] float32
    """Score all experts, take K of them, weigh those."""
    native = native_gate.installed()
    choose = gate.choose_experts if native is None else native.choose_experts
    return choose(logits, bias, config)


def store_latents(cache: Tensor, slot_mapping: Tensor, kv_c: Tensor, k_pe: Tensor) -> None:
    """Write row i to slot slot_mapping[i] of the cache."""
    native = installed()
    store = reference.store_latents if native is None else native.store_latents
    store(cache, slot_mapping, kv_c, k_pe)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, tile: int
) -> Tensor:  # [T, H, Dq], [S, H, Dq], [S, H, Dv] -> [T, H, Dv]
    """Attend within one sequence; query i stands at position start + i."""
    native = installed()
    if native is None:
        return tiled_attention.prefill_attention(q, k, v, start, scale, tile)
    return native.prompt_attention(q, k, v, start, scale)


def absorbed_attention(
    q: Tensor, kv_b: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:  # [N, H, nope + R], [H, nope + v, C] -> [N, H, v]
    """Attend to cached latents in their own space, each query to a sequence of its own."""
    native = installed()
    attend = tiled_attention.absorbed_attention if native is None else native.absorbed_attention
    return attend(q, kv_b, cache, block_tables, context_lens, scale)
