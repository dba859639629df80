"""Naive DeepSeek: attention over the whole sequence with expanded heads, experts one token at a time.

Written from DeepSeek's papers and published modeling code; shares nothing with the product, not even how
config.json is read. Slow and literal on purpose.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Oracle:
    """A checkpoint, and the logits of every position of one sequence at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float64) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.weights: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self.weights |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        self.dtype = dtype
        self.is_v3 = self.config["model_type"] == "deepseek_v3"

    def logits(self, token_ids: list[int]) -> Tensor:  # -> [S, V]
        """Run the whole sequence from scratch."""
        hidden = self.weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer_id in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer_id}."
            hidden = hidden + self._attention(
                prefix + "self_attn.", self._norm(prefix + "input_layernorm", hidden)
            )
            normed = self._norm(prefix + "post_attention_layernorm", hidden)
            mlp = self._experts if self._is_moe(layer_id) else self._dense
            hidden = hidden + mlp(prefix + "mlp.", normed)
        hidden = self._norm("model.norm", hidden)
        is_tied = self.config["tie_word_embeddings"]
        return hidden @ self.weights["model.embed_tokens.weight" if is_tied else "lm_head.weight"].T

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Continue a prompt with the likeliest tokens."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.logits(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]

    def _is_moe(self, layer_id: int) -> bool:
        frequency = self.config.get("moe_layer_freq", 1)
        return layer_id >= self.config["first_k_dense_replace"] and layer_id % frequency == 0

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        bias = self.weights.get(name + ".bias")
        product = rows @ self.weights[name + ".weight"].T
        return product if bias is None else product + bias

    def _norm(self, name: str, rows: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        normed = rows / torch.sqrt(rows.pow(2).mean(-1, keepdim=True) + eps) * self.weights[name + ".weight"]
        return normed + self.weights.get(name + ".bias", 0)

    def _swiglu(self, prefix: str, rows: Tensor) -> Tensor:
        gate = self._linear(prefix + "gate_proj", rows)
        return self._linear(
            prefix + "down_proj", gate * torch.sigmoid(gate) * self._linear(prefix + "up_proj", rows)
        )

    _dense = _swiglu

    # ---- attention

    def _attention(self, prefix: str, rows: Tensor) -> Tensor:
        config = self.config
        heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        length = len(rows)
        if config["q_lora_rank"] is None:
            queries = self._linear(prefix + "q_proj", rows)
        else:
            latent = self._norm(prefix + "q_a_layernorm", self._linear(prefix + "q_a_proj", rows), 1e-6)
            queries = self._linear(prefix + "q_b_proj", latent)
        queries = queries.view(length, heads, nope + rope)
        compressed = self._linear(prefix + "kv_a_proj_with_mqa", rows)
        latents = self._norm(prefix + "kv_a_layernorm", compressed[:, :rank], 1e-6)
        expanded = self._linear(prefix + "kv_b_proj", latents).view(length, heads, nope + value)
        turned_keys = self._rotate(compressed[:, None, rank:]).expand(length, heads, rope)
        keys = torch.cat([expanded[..., :nope], turned_keys], dim=-1)
        queries = torch.cat([queries[..., :nope], self._rotate(queries[..., nope:])], dim=-1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * self._softmax_scale(nope + rope)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", attention, expanded[..., nope:])
        return self._linear(prefix + "o_proj", mixed.reshape(length, heads * value))

    def _rotate(self, x: Tensor) -> Tensor:  # [S, H, R]; pairs are neighbours
        positions = torch.arange(len(x), dtype=torch.float64)
        angles = positions[:, None] * self._frequencies()[None, :]
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
        turned = pairs * torch.polar(torch.full_like(angles, self._rope_magnitude()), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2).to(self.dtype)

    def _yarn(self) -> dict[str, Any] | None:
        scaling: dict[str, Any] | None = self.config.get("rope_scaling")
        return scaling

    def _theta(self) -> float:
        return float(self.config["rope_theta"])

    def _frequencies(self) -> Tensor:
        dim, yarn = self.config["qk_rope_head_dim"], self._yarn()
        plain = [self._theta() ** (-2 * pair / dim) for pair in range(dim // 2)]
        if yarn is None:
            return torch.tensor(plain, dtype=torch.float64)
        length = yarn["original_max_position_embeddings"]

        def pair_turning(times: float) -> float:
            return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(self._theta()))

        low = max(math.floor(pair_turning(yarn.get("beta_fast", 32))), 0)
        high: float = min(math.ceil(pair_turning(yarn.get("beta_slow", 1))), dim - 1)
        high = high + 0.001 if low == high else high
        blended = []
        for pair, frequency in enumerate(plain):
            share = min(max((pair - low) / (high - low), 0.0), 1.0)
            blended.append(share * frequency / yarn["factor"] + (1 - share) * frequency)
        return torch.tensor(blended, dtype=torch.float64)

    @staticmethod
    def _sharpening(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    def _rope_magnitude(self) -> float:
        yarn = self._yarn()
        if yarn is None:
            return 1.0
        over = self._sharpening(yarn["factor"], yarn.get("mscale", 1))
        return over / self._sharpening(yarn["factor"], yarn.get("mscale_all_dim", 0))

    def _softmax_scale(self, head_dim: int) -> float:
        yarn = self._yarn()
        scale = 1 / math.sqrt(head_dim)
        if yarn is not None and yarn.get("mscale_all_dim", 0):
            scale *= self._sharpening(yarn["factor"], yarn["mscale_all_dim"]) ** 2
        return scale

    # ---- experts

    def _experts(self, prefix: str, rows: Tensor) -> Tensor:
        output = []
        for row in rows:
            total = torch.zeros_like(row)
            for expert_id, weight in self.choose(prefix, row):
                total = total + weight * self._swiglu(f"{prefix}experts.{expert_id}.", row)
            output.append(total)
        routed = torch.stack(output)
        if self.config["n_shared_experts"]:
            routed = routed + self._swiglu(prefix + "shared_experts.", rows)
        return routed

    def choose(self, prefix: str, row: Tensor) -> list[tuple[int, float]]:
        """Return the experts of one token and the weight of each."""
        config = self.config
        logits = self.weights[prefix + "gate.weight"] @ row
        default = "sigmoid" if self.is_v3 else "softmax"
        is_sigmoid = (config.get("scoring_func") or default) == "sigmoid"
        scores = (torch.sigmoid(logits) if is_sigmoid else logits.softmax(-1)).tolist()
        method = config.get("topk_method") or ("noaux_tc" if self.is_v3 else "greedy")
        choice = list(scores)
        if method == "noaux_tc":
            bias = self.weights[prefix + "gate.e_score_correction_bias"].tolist()
            choice = [score + correction for score, correction in zip(scores, bias, strict=True)]
        allowed = list(range(len(scores)))
        if method != "greedy":
            allowed = self._allowed(choice, 2 if method == "noaux_tc" else 1)
        best = sorted(allowed, key=lambda expert_id: -choice[expert_id])[: config["num_experts_per_tok"]]
        weights = [scores[expert_id] for expert_id in best]
        return list(zip(best, self._weigh(weights), strict=True))

    def _allowed(self, choice: list[float], num_counted: int) -> list[int]:
        num_groups = self.config["n_group"]
        size = len(choice) // num_groups
        groups = [list(range(group * size, (group + 1) * size)) for group in range(num_groups)]
        worth = [sum(sorted((choice[e] for e in group), reverse=True)[:num_counted]) for group in groups]
        kept = sorted(range(num_groups), key=lambda group: -worth[group])[: self.config["topk_group"]]
        return [expert_id for group in sorted(kept) for expert_id in groups[group]]

    def _weigh(self, weights: list[float]) -> list[float]:
        normalizes = self.config.get("norm_topk_prob", self.is_v3)
        factor = self.config["routed_scaling_factor"]
        if not self.is_v3:
            if normalizes and len(weights) > 1:
                return [weight / sum(weights) for weight in weights]
            return [weight * factor for weight in weights]
        total = sum(weights) if normalizes else 1.0
        return [weight / total * factor for weight in weights]
