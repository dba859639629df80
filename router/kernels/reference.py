"""The router's operations in plain PyTorch: runs everywhere, and is the oracle for every other device.

Shapes: T tokens, S keys of a sequence, N tokens on the decode path, H heads, C kv_lora_rank,
R qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.int8_reference import (
    int8_linear,
    int8_mlp,
    pack_int8,
    quantize_rows,
    quantize_rows_static,
    quantizing_linear,
)
from common.layer_weights import LayerWeights
from common.model_config import ModelConfig
from router.kernels.gate import choose_experts

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [T, in], [out, in], [out] -> [T, out]
    """Multiply every row by the weight."""
    return F.linear(x, weight, bias)


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:  # [T, D], [E, D] float32 -> [T, E] float32
    """Multiply every row by the gate's weight, in float32."""
    return F.linear(x.float(), weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [T, D], [D] -> [T, D]
    """Scale every row to unit root mean square in float32, round, then apply the weight."""
    wide = x.float()
    variance = wide.pow(2).mean(dim=-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add the update to the residual, in place, and normalise that: 2 x [T, D], [D] -> [T, D]."""
    residual += update
    return rms_norm(residual, weight, eps)


def add_routed(shared: Tensor, routed: Tensor) -> Tensor:  # [T, D], [T, D] float32 -> [T, D]
    """Add what routed experts made to what shared ones did, rounding once."""
    return (routed + shared.float()).to(shared.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # 2 x [T, F] -> [T, F]
    """Return silu(gate) * up, computed in float32 and rounded once."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def mlp_rows(num_rows: int, intermediate_size: int) -> int:
    """Take all of them."""
    return max(num_rows, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H, R], 2 x [T, R/2] -> [T, H, R]
    """Turn each pair of neighbours by its angle; DeepSeek checkpoints keep the halves interleaved."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def store_latents(cache: Tensor, slot_mapping: Tensor, kv_c: Tensor, k_pe: Tensor) -> None:
    """Write row i to slot slot_mapping[i] of the cache."""
    cache.view(-1, cache.shape[-1])[slot_mapping] = torch.cat([kv_c, k_pe], dim=-1).to(cache.dtype)


def compose_rotate_and_store(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor],
    store_latents: Callable[[Tensor, Tensor, Tensor, Tensor], None],
) -> Callable[..., None]:
    """Make `rotate_and_store` of a device's own steps."""

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
        kv_c, k_pe = latents.tensor_split([len(norm_weight)], dim=-1)
        q_pe = q[..., -k_pe.shape[1] :]
        q_pe.copy_(rotate(q_pe, cos, sin))
        kv_c = rms_norm(kv_c, norm_weight, eps)
        if norm_bias is not None:
            kv_c = kv_c + norm_bias
        store_latents(cache, slot_mapping, kv_c, rotate(k_pe.unsqueeze(1), cos, sin).squeeze(1))

    return rotate_and_store


rotate_and_store = compose_rotate_and_store(rms_norm, rotate, store_latents)


def gather_latents(cache: Tensor, block_table: Tensor, length: int) -> Tensor:  # -> [length, C + R]
    """Read the first `length` rows of a sequence."""
    return cache[block_table].flatten(0, 1)[:length]


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, tile: int
) -> Tensor:  # [T, H, Dq], [S, H, Dq], [S, H, Dv] -> [T, H, Dv]
    """Attend within one sequence, all scores at once."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    positions = start + torch.arange(q.shape[0], device=q.device)
    is_hidden = torch.arange(k.shape[0], device=q.device) > positions.unsqueeze(1)  # [T, S]
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def absorbed_attention(
    q: Tensor, kv_b: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:  # [N, H, nope + R], [H, nope + v, C] -> [N, H, v]
    """Attend to cached latents in their own space, each query to a sequence of its own."""
    attend = partial(
        decode_attention, cache=cache, block_tables=block_tables, context_lens=context_lens, scale=scale
    )
    return through_latents(q, kv_b, cache.shape[2], per_head_linear, attend)


def through_latents(
    q: Tensor,
    kv_b: Tensor,
    width: int,
    multiply: Callable[[Tensor, Tensor], Tensor],
    attend: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # [N, H, nope + R], [H, nope + v, C] -> [N, H, v]
    """Compose absorbed attention of a device's product of heads and its attention to latents.

    Args:
        width: C + R.
        multiply: [N, H, in], [H, out, in] -> [N, H, out].
        attend: [N, H, C], [N, H, R] -> [N, H, C].
    """
    num_nope = q.shape[2] - (width - kv_b.shape[2])
    q_latent = multiply(q[..., :num_nope], kv_b[:, :num_nope].transpose(1, 2))  # [N, H, C]
    return multiply(attend(q_latent, q[..., num_nope:]), kv_b[:, num_nope:])


def per_head_linear(x: Tensor, weight: Tensor) -> Tensor:  # [N, H, in], [H, out, in] -> [N, H, out]
    """Multiply the rows of every head by that head's weight."""
    return torch.einsum("thi,hoi->tho", x, weight)


def decode_attention(  # -> [N, H, C]
    q_latent: Tensor, q_pe: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Attend to cached latents, one query after the other."""
    output = torch.empty_like(q_latent)
    for row, length in enumerate(context_lens.tolist()):
        latents = gather_latents(cache, block_tables[row], length).float()  # [S, C + R]
        query = torch.cat([q_latent[row], q_pe[row]], dim=-1).float()  # [H, C + R]
        weights = (query @ latents.T * scale).softmax(dim=-1)  # [H, S]
        output[row] = weights @ latents[:, : q_latent.shape[-1]]
    return output


def decode_layer(weights: LayerWeights, config: ModelConfig) -> None:
    """There is no such operation: its parts are run one after another."""
