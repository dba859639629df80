"""Which experts a token goes to, and how much each of them weighs, in plain PyTorch: the same on every
device.

Shapes: T tokens, K experts per token, E experts, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.model_config import ModelConfig
from common.rows import row_sum, softmax


def choose_experts(
    logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:  # [T, E], [E] -> [T, K] int64, [T, K] float32
    """Score all experts, take K of them, weigh those."""
    scores = SCORE_EXPERTS[config.scoring_func](logits)
    topk_ids = SELECT_EXPERTS[config.topk_method](scores, bias, config)
    return topk_ids, WEIGH_EXPERTS[config.family](scores.gather(-1, topk_ids), config)


def sigmoid(logits: Tensor) -> Tensor:  # [T, E] -> [T, E]
    """Score every expert for itself."""
    # Not torch.sigmoid: on a CPU it rounds the last elements of a tensor in another way than the others.
    return 1 / (1 + torch.exp(-logits))


def greedy(scores: Tensor, bias: Tensor | None, config: ModelConfig) -> Tensor:  # [T, E] -> [T, K]
    """Take the best experts, wherever they are."""
    return scores.topk(config.num_experts_per_tok, dim=-1).indices


def group_limited_greedy(
    scores: Tensor, bias: Tensor | None, config: ModelConfig
) -> Tensor:  # [T, E] -> [T, K]
    """Take the best experts of the groups whose single best expert is best."""
    groups = scores.unflatten(-1, (config.num_groups, -1))  # [T, G, E/G]
    return _topk_within_groups(scores, groups.amax(dim=-1), config)


def noaux_tc(scores: Tensor, bias: Tensor | None, config: ModelConfig) -> Tensor:  # [T, E] -> [T, K]
    """Take the best experts after a learned correction, of the groups whose two best experts sum highest."""
    # The bias steers which experts are chosen, never how much they weigh.
    choice = scores if bias is None else scores + bias
    groups = choice.unflatten(-1, (config.num_groups, -1))  # [T, G, E/G]
    best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values
    group_scores = best_two[..., 0] + best_two[..., 1] if best_two.shape[-1] == 2 else best_two[..., 0]
    return _topk_within_groups(choice, group_scores, config)


def _topk_within_groups(choice: Tensor, group_scores: Tensor, config: ModelConfig) -> Tensor:
    kept = group_scores.topk(config.num_kept_groups, dim=-1).indices  # [T, kept groups]
    is_kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, kept, True)  # [T, G]
    is_allowed = is_kept.repeat_interleave(config.n_routed_experts // config.num_groups, dim=-1)  # [T, E]
    # Not 0: a corrected score may be negative, and an expert of another group must still lose against it.
    return choice.masked_fill(~is_allowed, float("-inf")).topk(config.num_experts_per_tok, dim=-1).indices


SCORE_EXPERTS: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}

SELECT_EXPERTS: dict[str, Callable[[Tensor, Tensor | None, ModelConfig], Tensor]] = {
    "greedy": greedy,
    "group_limited_greedy": group_limited_greedy,
    "noaux_tc": noaux_tc,
}


def weigh_v2(chosen: Tensor, config: ModelConfig) -> Tensor:  # [T, K] -> [T, K]
    """Weigh experts as DeepSeek-V2's code does: norm_topk_prob takes the place of the scaling factor."""
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        return _normalized(chosen)
    return chosen * config.routed_scaling_factor


def weigh_v3(chosen: Tensor, config: ModelConfig) -> Tensor:  # [T, K] -> [T, K]
    """Weigh experts as DeepSeek-V3's code does: norm_topk_prob comes before the scaling factor."""
    weights = _normalized(chosen) if config.norm_topk_prob else chosen
    return weights * config.routed_scaling_factor


def _normalized(chosen: Tensor) -> Tensor:
    return chosen / (row_sum(chosen) + 1e-20)


WEIGH_EXPERTS: dict[str, Callable[[Tensor, ModelConfig], Tensor]] = {"v2": weigh_v2, "v3": weigh_v3}
