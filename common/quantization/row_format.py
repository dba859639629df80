"""Which layers take their rows in int8: what router and expert workers must agree on. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.model_config import ModelConfig
from common.quantization.description import W8A8_DYNAMIC, read_description

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def int8_layers(model_path: Path, config: ModelConfig) -> frozenset[int]:
    """Return the MoE layers of which every routed expert is W8A8_DYNAMIC.

    A layer with experts of both kinds is none of them: who holds those in int8 quantises rows on arrival.

    Raises:
        CheckpointError: there are two descriptions of the tensors, or one cannot be read.
    """
    description = read_description(model_path)
    if description is None:
        return frozenset()
    return frozenset(
        layer_id
        for layer_id in config.moe_layer_ids
        if all(description.types.get(name) == W8A8_DYNAMIC for name in _weights(layer_id, config))
    )


def _weights(layer_id: int, config: ModelConfig) -> Iterator[str]:
    for expert in range(config.n_routed_experts):
        for projection in PROJECTIONS:
            yield f"model.layers.{layer_id}.mlp.experts.{expert}.{projection}.weight"
