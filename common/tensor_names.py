"""Whose a tensor of a checkpoint is, by its name. Torch-free."""

from __future__ import annotations

import re

from common.model_config import ModelConfig

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_id_of(name: str) -> int:
    """The decoder layer a tensor belongs to; -1 for one of no layer."""
    match = LAYER.match(name)
    return int(match.group(1)) if match else -1


def is_elsewhere(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is a routed expert's, or repeats what the configuration already says."""
    if ".mlp.experts." in name:
        return layer_id_of(name) in config.moe_layer_ids
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    if name.endswith(".mlp.gate.e_score_correction_bias"):
        return config.topk_method != "noaux_tc" and layer_id_of(name) in config.moe_layer_ids
    return name.endswith(".rotary_emb.inv_freq")
