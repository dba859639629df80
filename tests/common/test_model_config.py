"""Both layouts of config.json, the defaults of each family, one sentence for every value that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError
from common.model_config import ModelConfig
from tests.tiny_checkpoint import COMMON, FAMILIES, YARN


def write(directory: Path, family: str = "v3", drop: tuple[str, ...] = (), **overrides: Any) -> Path:
    config = COMMON | FAMILIES[family] | overrides
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return directory


def test_a_silent_v3_directory_gets_the_defaults_of_its_family(tmp_path: Path) -> None:
    drop = ("scoring_func", "topk_method", "norm_topk_prob", "num_nextn_predict_layers", "moe_layer_freq")
    config = ModelConfig.from_directory(write(tmp_path, drop=drop))
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert config.num_nextn_predict_layers == 0
    assert config.moe_layer_ids == (1, 2, 3)


def test_a_silent_v2_directory_gets_the_defaults_of_its_family(tmp_path: Path) -> None:
    drop = ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group")
    config = ModelConfig.from_directory(write(tmp_path, "v2", drop=drop))
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert (config.num_groups, config.num_kept_groups) == (1, 1)


def test_both_layouts_of_rotary_parameters_say_the_same(tmp_path: Path) -> None:
    published = ModelConfig.from_directory(write(tmp_path, rope_theta=50000, rope_scaling=YARN))
    saved: dict[str, Any] = {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 50000}}
    drop = ("rope_theta", "rope_scaling", "torch_dtype")
    assert ModelConfig.from_directory(write(tmp_path, drop=drop, dtype="bfloat16", **saved)) == published
    assert published.rope_theta == 50000
    assert published.rope_scaling is not None
    assert published.rope_scaling.factor == 40
    plain: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    assert ModelConfig.from_directory(write(tmp_path, drop=drop, **plain)).rope_scaling is None
    assert ModelConfig.from_directory(write(tmp_path, rope_scaling=None)).rope_scaling is None


@pytest.mark.parametrize(
    ("overrides", "family"),
    [
        ({"topk_method": "noaux_tc"}, "v3"),
        ({"topk_method": "greedy", "architectures": None}, "v2"),
        ({}, "v3"),
    ],
)
def test_what_mindie_calls_deepseekv2_is_told_apart(
    tmp_path: Path, overrides: dict[str, Any], family: str
) -> None:
    overrides = {"model_type": "deepseekv2", **overrides}
    assert ModelConfig.from_directory(write(tmp_path, **overrides)).family == family


def test_moe_layers_follow_first_k_dense_replace_and_moe_layer_freq(tmp_path: Path) -> None:
    config = write(tmp_path, num_hidden_layers=10, first_k_dense_replace=3, moe_layer_freq=2)
    assert ModelConfig.from_directory(config).moe_layer_ids == (4, 6, 8)


def test_eos_ids_come_from_generation_config_first(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(write(tmp_path, eos_token_id=[1, 7]))
    assert config.eos_token_ids(tmp_path) == (1, 7)
    generation = tmp_path / "generation_config.json"
    for stated, expected in [
        ('{"eos_token_id": 5}', (5,)),
        ('{"eos_token_id": [5, 6, 5]}', (5, 6)),
        ("{}", (1, 7)),
    ]:
        generation.write_text(stated)
        assert config.eos_token_ids(tmp_path) == expected
    generation.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: eos_token_id is '</s>', but it must be"
    ):
        config.eos_token_ids(tmp_path)


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "llama"},
        "model_type is 'llama', but only deepseek_v2, deepseek_v3, deepseekv2 are supported",
    ),
    ({"model_type": None}, "model_type is None, but only"),
    ({"hidden_size": 0}, "hidden_size is 0, but it must be greater than 0"),
    ({"hidden_size": "64"}, "hidden_size is '64', but it must be a valid integer"),
    ({"hidden_size": 64.5}, "hidden_size is 64.5, but it must be a valid integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, but it must be a valid integer"),
    ({"kv_lora_rank": None}, "kv_lora_rank is missing, but the model needs it"),
    ({"scoring_func": "tanh"}, "scoring_func is 'tanh', but it must be 'softmax' or 'sigmoid'"),
    ({"topk_method": "random"}, "topk_method is 'random', but it must be"),
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15, but it must be even"),
    ({"n_group": 3}, "n_group is 3, but it must divide n_routed_experts, 16"),
    ({"topk_group": 5}, "topk_group is 5, but it must not exceed n_group, 4"),
    ({"num_experts_per_tok": 9}, "leaves only 8 experts to choose from"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17, but it must not exceed n_routed_experts, 16"),
    ({"topk_method": "group_limited_greedy", "n_group": 0}, "n_group is 0, but it must be greater than 0"),
    ({"first_k_dense_replace": 4}, "one of the 4 layers must have routed experts"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu' is supported"),
    ({"rope_interleave": False}, "rope_interleave is False, but only True is supported"),
    (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config.quant_method is 'awq', but only 'fp8' is supported",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
        "quantization_config.fmt is 'e5m2', but only 'e4m3' is supported",
    ),
    (
        {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config.weight_block_size is None, but FP8 weights are only supported in blocks",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
        "weight_block_size.1 is 0, but it must be greater than 0",
    ),
    ({"quantization_config": "fp8"}, "quantization_config is 'fp8', but it must be an object"),
    (
        {"quantize": "w8a8_dynamic"},
        "quantize is 'w8a8_dynamic', but no quant_model_description*.json is beside it",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        "the type in rope_scaling is 'linear', but only yarn",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    (
        {"rope_scaling": YARN | {"factor": 0.5}},
        "rope_scaling.factor is 0.5, but it must be greater than or equal to 1",
    ),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', but it must be an object or null"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan, but it must be a finite number"),
    ({"eos_token_id": [1, -2]}, "but it must be a token id or a list of token ids"),
    ({"eos_token_id": "</s>"}, "eos_token_id has '</s>', but it must be a token id"),
]


@pytest.mark.parametrize(("overrides", "sentence"), BAD_VALUES)
def test_a_bad_value_is_one_sentence_with_file_key_value_and_rule(
    tmp_path: Path, overrides: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_directory(write(tmp_path, **overrides))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "is missing"), ("{", "is not JSON"), ("[]", "must hold a JSON object")]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {sentence}"):
        ModelConfig.from_directory(tmp_path)


def test_a_group_limited_gate_needs_groups(tmp_path: Path) -> None:
    directory = write(tmp_path, "v2", topk_method="group_limited_greedy", n_group=None, topk_group=None)
    with pytest.raises(CheckpointError, match="n_group is None and topk_group is None, but topk_method"):
        ModelConfig.from_directory(directory)
