"""Writes a random-weight checkpoint in the shape of DeepSeek-V2-Lite with 6 layers, for the serving tables.

`python -m benchmarks.v2_lite_shape DIR`: 1 dense and 5 MoE layers, 64 experts top-6, bfloat16, 5.9 GB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common.quantize import main as quantize
from tests.tiny_checkpoint import write_checkpoint

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
}


MOE_LAYERS_ONLY: dict[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 0, "vocab_size": 1024}
"""What makes of it three MoE layers and next to nothing else."""


def write_quantised_layers(directory: Path) -> None:
    """Write these layers in W8A8, 1.8 GB, unless they are there already; meanwhile it takes 5.3 GB."""
    if (directory / "config.json").exists():
        return
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        write_checkpoint(Path(folder) / "bfloat16", family="v2", **{**SHAPE, **MOE_LAYERS_ONLY})
        if quantize([str(Path(folder) / "bfloat16"), str(directory)]) != 0:
            raise SystemExit(f"{directory} was not written")


def main() -> None:
    """Write the checkpoint unless it is there already."""
    directory = Path(sys.argv[1])
    if not (directory / "config.json").exists():
        write_checkpoint(directory, family="v2", **SHAPE)


if __name__ == "__main__":
    main()
