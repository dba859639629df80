"""The router's operations on an Ascend NPU.

Operators and limits: common.npu_limits. What is outside of them is computed by the reference, on the NPU too.
Shapes: T tokens, S keys of a sequence, N tokens on the decode path, H heads, C kv_lora_rank,
R qk_rope_head_dim, E experts, K experts per token.
"""

from __future__ import annotations

from functools import cache as remembered
from functools import partial

import torch
import torch_npu
from torch import Tensor

from common import npu_limits
from common.int8_reference import PackedInt8
from common.model_config import ModelConfig
from router.kernels import reference
from router.kernels.gate import choose_experts as choose_plainly
from router.kernels.reference import (
    add_routed,
    compose_rotate_and_store,
    decode_layer,
    gate_logits,
    linear,
    mlp_rows,
    pack_int8,
    per_head_linear,
    through_latents,
)

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

SOFTMAX, SIGMOID = 0, 1
"""npu_moe_gating_top_k: norm_type."""
BY_BEST, BY_BEST_TWO = 0, 1
"""npu_moe_gating_top_k: group_select_mode, what a group is worth."""
CAUSAL, MASK_SIZE = 3, 2048
"""npu_fused_infer_attention_score: sparse_mode that aligns the triangle with the last key, and its mask's
size."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [T, in] -> [T, in] int8, [T] float32
    """Quantise every row for itself."""
    if x.dtype == torch.float32 or not len(x):  # documented for float16 and bfloat16
        return reference.quantize_rows(x)
    rows, scales = torch_npu.npu_dynamic_quant(x)
    return rows, scales


def quantize_rows_static(x: Tensor, scale: float, offset: float) -> Tensor:  # [T, in] -> [T, in] int8
    """Quantise all rows alike."""
    if not len(x):
        return x.to(torch.int8)
    scales = torch.full((1,), scale, device=x.device)
    offsets = torch.full((1,), int(offset), dtype=torch.int32, device=x.device)
    quantized: Tensor = torch_npu.npu_quantize(x, scales, offsets, torch.qint8, axis=-1)
    return quantized


def int8_linear(rows: Tensor, row_scales: Tensor | None, packed: PackedInt8) -> Tensor:
    """Multiply int8 rows: [T, in] int8, [T] float32 or None -> [T, out] float32.

    The operator returns the sums: scaled by itself it would round them to the model's dtype too early.
    """
    weight = packed.parts[0]
    if not len(rows) or max(weight.shape) > npu_limits.MOST_QUANT_COLUMNS:
        return reference.int8_linear(rows, row_scales, packed)
    sums = torch_npu.npu_quant_matmul(
        rows, weight.t(), packed.scale, bias=packed.bias, output_dtype=torch.int32
    )
    output: Tensor = sums.float() * packed.scale
    return output if row_scales is None else output * row_scales.unsqueeze(-1)


def quantizing_linear(x: Tensor, packed: PackedInt8, bias: Tensor | None) -> Tensor:  # [T, in] -> [T, out]
    """Quantise rows, multiply them, add the bias [out] in float32, and round to the dtype of x."""
    output = int8_linear(*quantize_rows(x), packed)
    return (output if bias is None else output + bias).to(x.dtype)


def int8_mlp(x: Tensor, gate_up: PackedInt8, down: PackedInt8) -> Tensor:  # [T, D] -> [T, D]
    """Run rows through gate_up [2F, D], SwiGLU and down [D, F]; gate and up are rounded to the dtype of x."""
    # npu_dynamic_quant takes no float32: what SwiGLU gives must have the model's dtype.
    hidden: Tensor = torch_npu.npu_swiglu(int8_linear(*quantize_rows(x), gate_up).to(x.dtype))
    return int8_linear(*quantize_rows(hidden), down).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [T, D], [D] -> [T, D]
    """Scale every row to unit root mean square, then by the weight."""
    if not len(x):
        return x
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return normed


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add the update to the residual, in place, and normalise that: 2 x [T, D], [D] -> [T, D]."""
    residual += update
    return rms_norm(residual, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # 2 x [T, F] -> [T, F]
    """Return silu(gate) * up."""
    product: Tensor = torch_npu.npu_swiglu(torch.cat([gate, up], dim=-1))
    return product


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H, R], 2 x [T, R/2] -> [T, H, R]
    """Turn each pair of neighbours by its angle, in float32: a far position is too coarse in bfloat16."""
    if not len(x):
        return x
    both = [angle.repeat_interleave(2, dim=-1)[None, :, None, :] for angle in (cos, sin)]
    turned = torch_npu.npu_rotary_mul(x.float().unsqueeze(0), *both, rotary_mode="interleave")
    return turned.squeeze(0).to(x.dtype)


def choose_experts(
    logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:  # [T, E], [E] -> [T, K] int64, [T, K] float32
    """Choose experts by the checkpoint's rules and weigh them."""
    is_grouped = config.topk_method != "greedy"
    num_groups, num_kept = (config.num_groups, config.num_kept_groups) if is_grouped else (1, 1)
    # The operator adds up the weights of sigmoid scores to 1 before it scales them, and leaves softmax's
    # alone.
    is_normalized = config.scoring_func == "sigmoid"
    fits = npu_limits.gating(logits.shape[1], num_groups, num_kept, config.num_experts_per_tok) is None
    if (
        not fits
        or not len(logits)
        or is_normalized != config.norm_topk_prob
        or (config.family == "v2" and is_normalized)
    ):
        return choose_plainly(logits, bias, config)
    weights, ids, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        config.num_experts_per_tok,
        bias=bias if config.topk_method == "noaux_tc" else None,
        k_group=num_kept,
        group_count=num_groups,
        group_select_mode=BY_BEST_TWO if config.topk_method == "noaux_tc" else BY_BEST,
        norm_type=SIGMOID if is_normalized else SOFTMAX,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    return ids.to(torch.int64), weights


# The operator wants latents and rotated keys in tensors of their own without gaps. So where it can be
# used, the memory of a layer's cache holds all latents first, [blocks, block_size, 512], and all rotated
# keys after them. Nobody but the functions below looks into it.


def _halves(cache: Tensor) -> tuple[Tensor, ...]:  # -> [blocks, bs, 512], [blocks, bs, 64], or the whole
    num_blocks, block_size, width = cache.shape
    if width != npu_limits.LATENT_SIZE + npu_limits.ROTARY_SIZE:
        return (cache,)
    flat = cache.view(-1)
    middle = num_blocks * block_size * npu_limits.LATENT_SIZE
    latents = flat[:middle].view(num_blocks, block_size, npu_limits.LATENT_SIZE)
    return latents, flat[middle:].view(num_blocks, block_size, npu_limits.ROTARY_SIZE)


def store_latents(cache: Tensor, slot_mapping: Tensor, kv_c: Tensor, k_pe: Tensor) -> None:
    """Write row i to slot slot_mapping[i] of the cache."""
    halves = _halves(cache)
    rows = torch.cat([kv_c, k_pe], dim=-1).to(cache.dtype)
    for half, own in zip(halves, rows.split([half.shape[2] for half in halves], dim=-1), strict=True):
        half.flatten(0, 1)[slot_mapping] = own


rotate_and_store = compose_rotate_and_store(rms_norm, rotate, store_latents)


def gather_latents(cache: Tensor, block_table: Tensor, length: int) -> Tensor:  # -> [length, C + R]
    """Read the first `length` rows of a sequence."""
    return torch.cat([half[block_table].flatten(0, 1)[:length] for half in _halves(cache)], dim=-1)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, tile: int
) -> Tensor:  # [T, H, Dq], [S, H, Dq], [S, H, Dv] -> [T, H, Dv]
    """Attend within one sequence; query i stands at position start + i."""
    num_keys = start + len(q)
    dtype = str(q.dtype).removeprefix("torch.")
    if npu_limits.prompt_attention(dtype, q.shape[1], q.shape[2], v.shape[2], num_keys) is not None:
        return reference.prefill_attention(q, k, v, start, scale, tile)
    output: Tensor = torch_npu.npu_fused_infer_attention_score(
        q.contiguous(),
        k[:num_keys].contiguous(),
        v[:num_keys].contiguous(),
        atten_mask=_causal_mask(q.device),
        actual_seq_lengths=[len(q)],
        actual_seq_lengths_kv=[num_keys],
        num_heads=q.shape[1],
        num_key_value_heads=q.shape[1],
        scale=scale,
        input_layout="TND",
        sparse_mode=CAUSAL,
    )[0]
    return output


@remembered
def _causal_mask(device: torch.device) -> Tensor:
    """The mask that sparse_mode asks for, whatever the lengths are."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def absorbed_attention(
    q: Tensor, kv_b: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:  # [N, H, nope + R], [H, nope + v, C] -> [N, H, v]
    """Attend to cached latents in their own space, each query to a sequence of its own."""
    attend = partial(
        decode_attention, cache=cache, block_tables=block_tables, context_lens=context_lens, scale=scale
    )
    return through_latents(q, kv_b, cache.shape[2], per_head_linear, attend)


def decode_attention(  # -> [N, H, C]
    q_latent: Tensor, q_pe: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Attend to cached latents, each query to a sequence of its own."""
    num_queries, num_heads, num_latents = q_latent.shape
    if num_queries == 0:
        return torch.empty_like(q_latent)
    dtype = str(q_latent.dtype).removeprefix("torch.")
    block_size = cache.shape[1]
    halves = _halves(cache)
    if npu_limits.latent_attention(dtype, num_heads, num_latents, q_pe.shape[2], block_size) is not None:
        joined = torch.cat(halves, dim=-1)
        return reference.decode_attention(q_latent, q_pe, joined, block_tables, context_lens, scale)
    latents, rotated = halves
    keys = latents.unsqueeze(1)  # [blocks, 1, block_size, C]
    output: Tensor = torch_npu.npu_fused_infer_attention_score(
        q_latent.unsqueeze(2).contiguous(),
        keys,
        keys,
        query_rope=q_pe.unsqueeze(2).contiguous(),
        key_rope=rotated.unsqueeze(1),
        block_table=block_tables.to(torch.int32),
        actual_seq_lengths_kv=context_lens.tolist(),
        num_heads=num_heads,
        num_key_value_heads=1,
        scale=scale,
        input_layout="BNSD",
        block_size=block_size,
    )[0]
    return output.squeeze(2)
