"""One call for what a layer does to generated tokens before its experts, where a device has such a call."""

from __future__ import annotations

from torch import Tensor, nn

from common.int8_reference import PackedInt8
from common.layer_weights import LayerWeights
from router.batch import Batch
from router.kernels import DecodeLayer
from router.model.deepseek import LATENT_NORM_EPS, BiasedRMSNorm, DecoderLayer, DeepseekForCausalLM, MoE
from router.model.int8_linear import DynamicInt8Linear


class FusedDecode(nn.Module):
    """Takes the place of norms, attention and gate in steps of which all rows are generated tokens."""

    def __init__(self, decode: DecodeLayer, has_experts: bool) -> None:
        super().__init__()
        self.decode = decode
        self.has_experts = has_experts

    def forward(
        self, residual: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, batch: Batch, blocks: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the rows for the experts, [T, D], and what the gate chose of these, 2 x [T, K]."""
        hidden_states, *chosen = self.decode(
            *(residual, update, cos, sin),
            *(batch.slot_mapping, batch.block_tables, batch.context_lens, blocks),
        )
        return hidden_states, (chosen[0], chosen[1]) if self.has_experts else None


def fuse_decode(model: DeepseekForCausalLM) -> None:
    """Give every layer such a call for which the device has one; the bits are the same without it."""
    for layer in model.model.layers:
        if isinstance(layer, DecoderLayer) and (weights := _weights_of(layer)) is not None:
            decode = model.kernels.decode_layer(weights, model.config)
            layer.fused_decode = None if decode is None else FusedDecode(decode, layer.has_experts)


def _weights_of(layer: DecoderLayer) -> LayerWeights | None:
    """None where the layer's linears are not all W8A8_DYNAMIC, or one of these, or a norm, has a bias."""
    attention, mlp = layer.self_attn, layer.mlp
    q, kv_a, o = map(
        _packed,
        (
            attention.q_b_proj if attention.has_q_lora else attention.q_proj,
            *(attention.kv_a_proj_with_mqa, attention.o_proj),
        ),
    )
    q_a = None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if attention.has_q_lora:
        norms.append(attention.q_a_layernorm)
        if (packed := _packed(attention.q_a_proj)) is None:
            return None
        q_a = packed, attention.q_a_layernorm.weight
    if q is None or kv_a is None or o is None or any(isinstance(norm, BiasedRMSNorm) for norm in norms):
        return None
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        q_a=q_a,
        q=q,
        kv_a=kv_a,
        kv_a_norm=(attention.kv_a_layernorm.weight, attention.kv_a_layernorm.bias),
        kv_b=attention.kv_b_proj.weight,
        o=o,
        post_norm=layer.post_attention_layernorm.weight,
        gate=(mlp.gate.weight, mlp.gate.e_score_correction_bias) if isinstance(mlp, MoE) else None,
        latent_eps=LATENT_NORM_EPS,
        scale=attention.scale,
    )


def _packed(linear: nn.Module) -> PackedInt8 | None:
    return linear.packed if isinstance(linear, DynamicInt8Linear) and linear.bias is None else None
