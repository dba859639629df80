"""Writes small checkpoints of the shapes that the fused operators take: those of DeepSeek's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.quantize import main as quantize_main
from tests.quantized_checkpoint import write_trained_like
from tests.tiny_checkpoint import write_checkpoint

ATTENTION: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
}


def write_within_limits(directory: Path, family: str, is_w8a8: bool = False, **overrides: Any) -> Path:
    """Write a checkpoint below `directory` and return its own directory."""
    whole, small = directory / f"{family}-random", directory / family
    write_checkpoint(whole, family, **{**ATTENTION, **overrides})
    write_trained_like(whole, small)
    if not is_w8a8:
        return small
    target = directory / f"{family}-w8a8"
    if quantize_main([str(small), str(target)]) != 0:
        raise AssertionError(f"{small} was not quantised")
    return target
