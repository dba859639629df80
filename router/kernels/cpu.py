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
from common.layer_weights import LayerWeights
from common.model_config import ModelConfig
from common.native_decode_layer import NativeDecodeLayer, takes
from common.native_floats import installed
from router.kernels import DecodeLayer, gate, reference, tiled_attention
from router.kernels.reference import compose_rotate_and_store, gather_latents

__all__ = [
    "absorbed_attention",
    "add_rms_norm",
    "add_routed",
    "choose_experts",
    "decode_layer",
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
    "rotate_and_store",
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


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add the update to the residual, in place, and normalise that: 2 x [T, D], [D] -> [T, D]."""
    native = installed()
    if native is not None:
        return native.add_rms_norm(residual, update, weight, eps)
    residual += update
    return rows.rms_norm(residual, weight, eps)


def add_routed(shared: Tensor, routed: Tensor) -> Tensor:  # [T, D], [T, D] float32 -> [T, D]
    """Add what routed experts made to what shared ones did, rounding once."""
    native = installed()
    return reference.add_routed(shared, routed) if native is None else native.add_routed(shared, routed)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # 2 x [T, F] -> [T, F]
    """Return silu(gate) * up, computed in float32 and rounded once."""
    native = installed()
    return rows.swiglu(gate, up) if native is None else native.swiglu(gate, up)


def mlp_rows(num_rows: int, intermediate_size: int) -> int:
    """Bound what lies between an MLP's weights: the activations of fewer rows, where they are wide."""
    fitting = MLP_ELEMENTS // intermediate_size // LEAST_MLP_ROWS * LEAST_MLP_ROWS
    return max(min(num_rows, fitting), LEAST_MLP_ROWS)


def choose_experts(
    logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:  # [T, E], [E] -> [T, K] int64, [T, K] float32
    """Score all experts, take K of them, weigh those."""
    native = native_gate.installed()
    choose = gate.choose_experts if native is None else native.choose_experts
    return choose(logits, bias, config)


def rotate_and_store(
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
    """Give queries and keys their positions, and normalised latents with these keys to the cache."""
    native = installed()
    place = _rotate_and_store if native is None else native.rotate_and_store
    place(q, latents, norm_weight, norm_bias, eps, cos, sin, cache, slot_mapping)


_rotate_and_store = compose_rotate_and_store(rows.rms_norm, reference.rotate, reference.store_latents)


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


def decode_layer(weights: LayerWeights, config: ModelConfig) -> DecodeLayer | None:
    """Make one call of a layer up to its experts, where the native kernels have packed its weights."""
    return NativeDecodeLayer(weights, config) if takes(weights) else None
