"""All experts in the router's own process: what the engine loads where there are no expert workers.

Shapes: R rows, E_local local experts, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.device import open_device
from expert_worker.kernels import load_kernels
from expert_worker.shard import Shard, ShardSource


def open_experts(
    model_path: Path,
    dtype: str,
    device: str,
    experts: Mapping[int, tuple[int, ...]],
    on_progress: Callable[[int, int], None],
) -> Callable[[int, Tensor, Tensor | None, Tensor, bool], Tensor]:
    """Load experts and return what computes with them: (layer_id, rows, row_scales, tokens_per_expert,
    is_grouped) -> rows.

    Args:
        model_path: the checkpoint's directory.
        dtype: "float32" or "bfloat16".
        device: a row of common.device.
        experts: layer_id -> checkpoint indices, in local order.
        on_progress: called with the bytes in memory and in all.

    Raises:
        CheckpointError: an expert is missing or has another shape.
        ConfigError: the device is not there.
    """
    shard = Shard(load_kernels(device), open_device(device))
    layers = shard.hold(ShardSource(Path(model_path), dtype), experts, on_progress)

    def compute(
        layer_id: int, rows: Tensor, row_scales: Tensor | None, tokens_per_expert: Tensor, is_grouped: bool
    ) -> Tensor:  # [R, D], [R], [E_local] -> [R, D]
        with torch.inference_mode():
            return layers[layer_id].forward(
                rows, tokens_per_expert, row_scales=row_scales, is_grouped=is_grouped
            )

    return compute
