"""DeepSeek-V3 for training, in plain torch. Read it from top to bottom.

Parameter paths are those of the published checkpoints, but for the routed experts of a layer, which are
stacked into three tensors here; `published_tensors` takes them apart.
Shapes: B rows of S tokens, T = B * S tokens, K experts per token, N = T * K rows that experts compute,
E experts, G groups of experts, D hidden_size, R qk_rope_head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.train_demo_model.chat_format import BOS_ID, EOS_ID

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 1600,
    "hidden_size": 192,
    "intermediate_size": 512,
    "moe_intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 24,
    "num_experts_per_tok": 4,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
"""The demo model's config.json."""


class Linear(nn.Linear):
    """A product with a weight and no bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


class RMSNorm(nn.Module):
    """Scales a row to unit root mean square, then by a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., size] -> [..., size]
        """Normalize every row for itself."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def rotary_table(positions: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position, 2 x [positions, dim/2]."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)
    return angles.cos(), angles.sin()


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:  # [B, heads, S, R], 2 x [S, R/2] -> [B, heads, S, R]
    """Turn neighbouring pairs by their position's angle: rotary halves lie interleaved in the checkpoint."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class MLA(nn.Module):
    """Multi-head latent attention: keys and values of a token are expanded from one latent."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_heads: int = config["num_attention_heads"]
        self.nope: int = config["qk_nope_head_dim"]
        self.rope: int = config["qk_rope_head_dim"]
        self.v: int = config["v_head_dim"]
        self.kv_lora_rank: int = config["kv_lora_rank"]
        hidden_size, eps = config["hidden_size"], config["rms_norm_eps"]
        self.q_a_proj = Linear(hidden_size, config["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(config["q_lora_rank"], eps)
        self.q_b_proj = Linear(config["q_lora_rank"], self.num_heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(hidden_size, self.kv_lora_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps)
        self.kv_b_proj = Linear(self.kv_lora_rank, self.num_heads * (self.nope + self.v))
        self.o_proj = Linear(self.num_heads * self.v, hidden_size)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Let every token attend to those the mask allows, [B, 1, S, S] bool; [B, S, D] -> [B, S, D]."""
        heads = (self.num_heads, -1)
        q = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
            .unflatten(-1, heads)
            .transpose(1, 2)
        )
        q_nope, q_pe = q.split([self.nope, self.rope], dim=-1)
        kv_c, k_pe = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(kv_c)).unflatten(-1, heads).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v], dim=-1)
        k_pe = rotate(k_pe.unsqueeze(1), cos, sin).expand(-1, self.num_heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_pe, cos, sin)], dim=-1)
        k = torch.cat([k_nope, k_pe], dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: the dense layer and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., D] -> [..., D]
        """Transform every token for itself."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Gate(nn.Module):
    """Chooses K of E experts for every token, within its best groups.

    The choice is balanced without an auxiliary loss (DeepSeek-V3 technical report, section 2.1.2): after each
    step the bias of an expert with more rows than the mean goes down, that of one with fewer goes up.
    """

    e_score_correction_bias: Tensor
    tokens_per_expert: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_experts: int = config["n_routed_experts"]
        self.num_chosen: int = config["num_experts_per_tok"]
        self.num_groups: int = config["n_group"]
        self.num_kept_groups: int = config["topk_group"]
        self.scaling: float = config["routed_scaling_factor"]
        self.weight = nn.Parameter(torch.empty(self.num_experts, config["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts))
        self.register_buffer("tokens_per_expert", torch.zeros(self.num_experts), persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # [T, D] -> 2 x [T, K]
        """Return the chosen experts and the weight of each."""
        scores = F.linear(hidden_states, self.weight).sigmoid()  # [T, E]
        with torch.no_grad():
            topk_ids = self._choose(scores)
            self.tokens_per_expert += torch.bincount(topk_ids.flatten(), minlength=self.num_experts)
        chosen = scores.gather(-1, topk_ids)
        return topk_ids, chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) * self.scaling

    def _choose(self, scores: Tensor) -> Tensor:  # [T, E] -> [T, K]
        choice = scores + self.e_score_correction_bias
        groups = choice.unflatten(-1, (self.num_groups, -1))  # [T, G, E/G]
        kept = groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.num_kept_groups, dim=-1).indices
        is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(-1, kept, True)
        allowed = groups.masked_fill(~is_kept.unsqueeze(-1), float("-inf")).flatten(1)
        return allowed.topk(self.num_chosen, dim=-1).indices

    @torch.no_grad()
    def balance(self, speed: float) -> float:
        """Move the bias by `speed` towards an even load; return max/mean of the load since the last call."""
        load = self.tokens_per_expert
        imbalance = float(load.max() / load.mean())
        self.e_score_correction_bias += speed * (load.mean() - load).sign()
        load.zero_()
        return imbalance


class StackedExperts(nn.Module):
    """The routed experts of a layer. Each computes the rows that chose it in one product."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        shape = (config["n_routed_experts"], config["moe_intermediate_size"], config["hidden_size"])
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs; [T, D], 2 x [T, K] -> [T, D]."""
        num_tokens, num_chosen = topk_ids.shape
        order = topk_ids.flatten().argsort(stable=True)  # [N], sorted by expert
        tokens_per_expert = torch.bincount(topk_ids.flatten(), minlength=len(self.gate_proj)).tolist()
        rows = hidden_states.index_select(0, order // num_chosen).split(tokens_per_expert)
        experts = zip(
            rows, self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True
        )
        outputs = torch.cat([F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) for x, g, u, d in experts])
        weighted = outputs * topk_weights.flatten().index_select(0, order).unsqueeze(-1)
        total = torch.zeros(num_tokens, hidden_states.shape[1], dtype=weighted.dtype)
        return total.index_add(0, order // num_chosen, weighted)


class MoE(nn.Module):
    """Routed experts and a shared one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = StackedExperts(config)
        shared_size = config["moe_intermediate_size"] * config["n_shared_experts"]
        self.shared_experts = MLP(config["hidden_size"], shared_size)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        """Add what the chosen experts and the shared one make of every token."""
        rows = hidden_states.flatten(0, 1)
        routed = self.experts(rows, *self.gate(rows))
        return self.shared_experts(hidden_states) + routed.view_as(hidden_states)


class DecoderLayer(nn.Module):
    """Attention, then experts or a dense MLP, each added to the residual."""

    def __init__(self, config: Mapping[str, Any], layer_id: int) -> None:
        super().__init__()
        hidden_size, eps = config["hidden_size"], config["rms_norm_eps"]
        is_dense = layer_id < config["first_k_dense_replace"]
        self.self_attn = MLA(config)
        self.mlp: nn.Module = MLP(hidden_size, config["intermediate_size"]) if is_dense else MoE(config)
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Compute one layer; [B, S, D] -> [B, S, D]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), cos, sin, mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeepseekModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_id) for layer_id in range(config["num_hidden_layers"])
        )
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.cos, self.sin = rotary_table(
            config["max_position_embeddings"], config["qk_rope_head_dim"], config["rope_theta"]
        )

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:  # [B, S], [B, 1, S, S] -> [B, S, D]
        """Compute the last hidden state of every token."""
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, mask)
        return self.norm(hidden_states)


class DemoModel(nn.Module):
    """The whole model, with random weights drawn from torch's generator."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = DeepseekModel(config)
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"])
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # What is added to the residual starts smaller, so that depth does not change its size.
                is_output = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                depth = (2 * config["num_hidden_layers"]) ** 0.5 if is_output else 1.0
                fan_in = 1 / 0.02**2 if "embed" in name else parameter.shape[-1]
                nn.init.normal_(parameter, std=fan_in**-0.5 / depth)

    def forward(self, input_ids: Tensor, document_ids: Tensor, wanted: Tensor) -> Tensor:
        """Return the logits of the wanted positions; a token sees only earlier ones of its own document.

        Shapes: 3 x [B, S] -> [wanted positions, V].
        """
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
        return self.lm_head(self.model(input_ids, mask)[wanted])

    def gates(self) -> dict[int, Gate]:
        """The gates by layer."""
        return {
            layer_id: layer.mlp.gate
            for layer_id, layer in enumerate(self.model.layers)
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE)
        }


def published_tensors(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor as the published checkpoints have them: bfloat16, the gates' biases float32."""
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.float()
        elif ".mlp.experts." in name:
            prefix, part = name.rsplit(".", 1)
            for expert, weight in enumerate(tensor):
                yield f"{prefix}.{expert}.{part}.weight", weight.to(torch.bfloat16).contiguous()
        else:
            yield name, tensor.to(torch.bfloat16)
