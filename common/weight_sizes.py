"""What weights take in memory, from the headers of a checkpoint's files: no number is read. Torch-free.

Shapes: N out-features, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.checkpoint_headers import StoredTensor, read_headers
from common.config import Config
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.quantization.description import FLOAT, read_description
from common.tensor_names import is_elsewhere, layer_id_of

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Of one number, by the dtype that weights are computed in."""
FLOAT32_BYTES = 4
ALWAYS_FLOAT32 = (".mlp.gate.weight", ".mlp.gate.e_score_correction_bias")
NOT_KEPT = ("_scale_inv", ".weight_offset", ".input_scale", ".input_offset")
"""What is used up while a weight is read."""


def computed_dtype(config: Config, model: ModelConfig) -> str:
    """The dtype of weights and arithmetic: what was configured, else what the checkpoint says.

    Raises:
        ConfigError: nobody computes with what the checkpoint says.
    """
    if config.dtype != "auto":
        return config.dtype
    if model.dtype_name not in ITEM_BYTES:
        raise ConfigError(
            f"ExpertMesh.dtype is auto and the checkpoint says {model.dtype_name}, but only float32 "
            "and bfloat16 are computed with: set ExpertMesh.dtype to one of them"
        )
    return model.dtype_name


def expert_bytes(model: ModelConfig, kind: str, item_bytes: int) -> int:
    """One expert's gate_proj [F, D], up_proj [F, D] and down_proj [D, F] in memory.

    Args:
        model: gives D and F.
        kind: FLOAT or W8A8_DYNAMIC, as common.quantization.description has it.
        item_bytes: of the dtype in which an expert in floating point is computed.
    """
    num_elements = 3 * model.moe_intermediate_size * model.hidden_size
    if kind == FLOAT:
        return num_elements * item_bytes
    # Int8, and a float32 scale for each out-feature.
    return num_elements + (2 * model.moe_intermediate_size + model.hidden_size) * FLOAT32_BYTES


class WeightSizes:
    """The sizes of one checkpoint's weights, computed with in `dtype`: "float32" or "bfloat16"."""

    def __init__(self, directory: Path, model: ModelConfig, dtype: str) -> None:
        """Read the headers.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
        """
        self._model = model
        self._item_bytes = ITEM_BYTES[dtype]
        self._tensors = read_headers(directory)
        self._description = read_description(directory)

    def router_bytes(self) -> int:
        """Everything but the routed experts, and but what no layer of this model uses."""
        return sum(
            self._router_bytes(name, tensor)
            for name, tensor in self._tensors.items()
            if not is_elsewhere(name, self._model) and layer_id_of(name) < self._model.num_hidden_layers
        )

    def shard_bytes(self, experts: Mapping[int, tuple[int, ...]]) -> int:
        """The experts of one worker: layer_id -> checkpoint indices.

        Raises:
            CheckpointError: the description of a W8A8 checkpoint does not give the type of one.
        """
        return sum(
            expert_bytes(self._model, self._kind(layer_id, expert), self._item_bytes)
            for layer_id, own in experts.items()
            for expert in own
        )

    def _kind(self, layer_id: int, expert: int) -> str:
        if self._description is None:
            return FLOAT
        return self._description.type_of(f"model.layers.{layer_id}.mlp.experts.{expert}.gate_proj.weight")

    def _router_bytes(self, name: str, tensor: StoredTensor) -> int:
        if name.endswith(NOT_KEPT):
            return 0
        if name.endswith(ALWAYS_FLOAT32) or tensor.dtype == "I64":
            return tensor.num_elements * FLOAT32_BYTES
        if tensor.dtype in ("I8", "I32"):
            return tensor.num_bytes
        if name.endswith("_scale"):
            return tensor.num_elements * FLOAT32_BYTES
        return tensor.num_elements * self._item_bytes
