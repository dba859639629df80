"""Decides what becomes of every tensor when a checkpoint is quantised to W8A8, and in which file it goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.checkpoint import Checkpoint
from common.checkpoint_writer import PlannedTensor
from common.quantization.description import FLOAT, W8A8_DYNAMIC
from common.stored_weights import FP8

INT8_LINEAR = re.compile(
    r"model\.layers\.\d+\."
    r"(mlp\.((shared_experts|experts\.\d+)\.)?(gate_proj|up_proj|down_proj)"
    r"|self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj))\.weight"
)
"""What becomes int8. Not kv_b_proj: attention takes its weight apart to move queries to the latent space."""

LM_HEAD = "lm_head.weight"
SCALE_INV = "_scale_inv"
STEM = "quant_model_weight_w8a8_dynamic"


@dataclass(frozen=True, slots=True)
class Conversion:
    """One tensor of the source and what it becomes.

    Attributes:
        source: its name.
        kind: W8A8_DYNAMIC or FLOAT.
        outputs: what is written, in one file.
    """

    source: str
    kind: str
    outputs: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """The size of what is written."""
        return sum(tensor.num_bytes for tensor in self.outputs)


def plan_conversions(
    checkpoint: Checkpoint, float_dtype: torch.dtype, int8_lm_head: bool
) -> tuple[Conversion, ...]:
    """Decide about every tensor.

    Args:
        checkpoint: in bf16, fp16, fp32 or FP8.
        float_dtype: of what is FP8 in the source and does not become int8.
        int8_lm_head: whether lm_head becomes int8 too.
    """
    conversions = []
    for name in checkpoint.names:
        if name.endswith(SCALE_INV) and name.removesuffix(SCALE_INV) in checkpoint:
            continue
        dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
        is_linear = INT8_LINEAR.fullmatch(name) is not None or (int8_lm_head and name == LM_HEAD)
        if is_linear and len(shape) == 2:
            conversions.append(Conversion(name, W8A8_DYNAMIC, _int8_tensors(name, shape)))
        else:
            kept = PlannedTensor(name, float_dtype if dtype == FP8 else dtype, shape)
            conversions.append(Conversion(name, FLOAT, (kept,)))
    return tuple(conversions)


def _int8_tensors(name: str, shape: tuple[int, ...]) -> tuple[PlannedTensor, ...]:
    path = name.removesuffix(".weight")
    return (
        PlannedTensor(name, torch.int8, shape),
        PlannedTensor(f"{path}.weight_scale", torch.float32, (shape[0], 1)),
        PlannedTensor(f"{path}.weight_offset", torch.float32, (shape[0], 1)),
    )


def plan_files(conversions: Sequence[Conversion], max_file_bytes: int) -> dict[str, tuple[Conversion, ...]]:
    """Spread conversions over files in order; a file is larger than the limit only if one tensor is."""
    files: list[list[Conversion]] = []
    filled = max_file_bytes
    for conversion in conversions:
        if not files or filled + conversion.num_bytes > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(conversion)
        filled += conversion.num_bytes
    return {
        f"{STEM}-{number:05d}-of-{len(files):05d}.safetensors": tuple(own)
        for number, own in enumerate(files, start=1)
    }
