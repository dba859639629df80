"""Fills the router's model from a checkpoint, one tensor at a time: everything but the routed experts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from common.model_config import ModelConfig
from common.stored_weights import StoredWeights
from router.kernels import load_kernels
from router.model.deepseek import DeepseekForCausalLM

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LAYER = re.compile(r"model\.layers\.(\d+)\.")
MAX_NAMED = 3
"""Keys an error names; the rest it counts."""


def load_model(
    model_path: Path, dtype: str, device: str, on_progress: Callable[[int, int], None]
) -> DeepseekForCausalLM:
    """Build the router's part of the model in `model_path` and read its weights.

    Args:
        dtype: "auto" (what the checkpoint says), "float32" or "bfloat16".
        on_progress: called with the bytes read so far and in all.

    Raises:
        CheckpointError: a file, a tensor or a value of the checkpoint is missing or wrong.
    """
    config = ModelConfig.from_directory(model_path)
    weights = StoredWeights(model_path, config)
    # Parameters without memory: each gets its own when its tensor arrives, so nothing is ever held twice.
    with torch.device("meta"):
        model = DeepseekForCausalLM(config, load_kernels(device), resolve_dtype(config, dtype))
    parameters = dict(model.named_parameters())
    stored = {name: weights.float_names(name) for name in parameters}
    _check_names(weights.checkpoint, config, [one for names in stored.values() for one in names])
    num_bytes = {name: sum(map(weights.checkpoint.num_bytes, names)) for name, names in stored.items()}
    total = sum(num_bytes.values())
    loaded = 0
    on_progress(loaded, total)
    for name, parameter in parameters.items():
        tensor = weights.float_tensor(name, tuple(parameter.shape), parameter.dtype).to(device)
        owner_path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        loaded += num_bytes[name]
        on_progress(loaded, total)
    return model.eval()


def resolve_dtype(config: ModelConfig, dtype: str) -> torch.dtype:
    """Return the dtype of weights and activations; "auto" is what the checkpoint says."""
    name = config.dtype_name if dtype == "auto" else dtype
    if name not in DTYPES:
        raise CheckpointError(
            f"the dtype of the checkpoint is {name!r}, but only float32 and bfloat16 are computed: "
            f"choose one of them with --dtype"
        )
    return DTYPES[name]


def _check_names(checkpoint: Checkpoint, config: ModelConfig, needed: Iterable[str]) -> None:
    """Name what the model needs and the checkpoint lacks, and what the checkpoint has and nobody needs."""
    wanted = dict.fromkeys(needed)
    missing = [name for name in wanted if name not in checkpoint]
    if missing:
        raise CheckpointError(f"{checkpoint.directory} lacks {_listed(missing)}, which config.json asks for")
    others = [name for name in checkpoint.names if name not in wanted]
    mtp = [name for name in others if _layer_id(name) >= config.num_hidden_layers]
    if mtp:
        logger.info(
            "ignoring layers for multi-token prediction: first_layer_id=%d num_tensors=%d",
            config.num_hidden_layers,
            len(mtp),
        )
    ignored = {*mtp, *(name for name in others if _is_elsewhere(name, config))}
    unexpected = [name for name in others if name not in ignored]
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.directory} holds {_listed(unexpected)}, which config.json does not account for"
        )


def _layer_id(name: str) -> int:
    match = LAYER.match(name)
    return int(match.group(1)) if match else -1


def _is_elsewhere(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is a routed expert's, or repeats what the configuration already says."""
    if ".mlp.experts." in name:
        return _layer_id(name) in config.moe_layer_ids
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    if name.endswith(".mlp.gate.e_score_correction_bias"):
        return config.topk_method != "noaux_tc" and _layer_id(name) in config.moe_layer_ids
    return name.endswith(".rotary_emb.inv_freq")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
