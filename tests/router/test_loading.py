"""What load_model reads, what it ignores, and what it refuses by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError
from router.model.deepseek import DeepseekForCausalLM
from router.model.loading import load_model
from tests.tiny_checkpoint import write_checkpoint


def write(directory: Path, family: str = "v3", **overrides: Any) -> Path:
    write_checkpoint(directory, family, vocab_size=128, num_shards=1, **overrides)
    return directory


def load(directory: Path, dtype: str = "auto") -> DeepseekForCausalLM:
    return load_model(directory, dtype, "cpu", lambda loaded, total: None)


def edit(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Add, replace or, where the value is None, remove tensors."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({name: tensors[name] for name in tensors if changes.get(name, tensors[name]) is not None}, file)


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_parameter_paths_are_the_checkpoint_keys_and_values_its_values(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)
    stored = load_file(tmp_path / "model.safetensors")
    parameters = dict(load(tmp_path).named_parameters())
    assert set(parameters) == {name for name in stored if ".mlp.experts." not in name}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored[name].to(parameter.dtype))
        assert parameter.dtype == (torch.float32 if ".mlp.gate." in name else torch.bfloat16)


def test_dtype_auto_is_what_the_checkpoint_says_and_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, "float32").model.embed_tokens.weight.dtype == torch.float32
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float16"'))
    with pytest.raises(CheckpointError, match="'float16', but only float32 and bfloat16 are computed"):
        load(tmp_path)
    assert load(tmp_path, "bfloat16").dtype == torch.bfloat16


def test_progress_counts_every_byte_but_the_experts(tmp_path: Path) -> None:
    write(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    expected = sum(tensor.nbytes for name, tensor in stored.items() if ".mlp.experts." not in name)
    seen: list[tuple[int, int]] = []
    load_model(tmp_path, "auto", "cpu", lambda loaded, total: seen.append((loaded, total)))
    assert seen[0] == (0, expected)
    assert seen[-1] == (expected, expected)
    assert seen == sorted(seen)


def test_layers_for_multi_token_prediction_are_ignored_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, mtp_layers=2)
    with caplog.at_level(logging.INFO, logger="router.model.loading"):
        model = load(tmp_path)
    assert len(model.model.layers) == 4
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "ignoring layers for multi-token prediction"
    ]


def test_layers_that_are_announced_and_absent_are_no_error(tmp_path: Path) -> None:
    load(write(tmp_path, num_nextn_predict_layers=3))


def test_what_only_repeats_the_configuration_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, tie_word_embeddings=True)
    edit(
        tmp_path,
        {
            "lm_head.weight": torch.zeros(128, 64),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        },
    )
    load(tmp_path)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, {"model.layers.2.self_attn.o_proj.weight": None})
    with pytest.raises(
        CheckpointError, match=r"lacks model\.layers\.2\.self_attn\.o_proj\.weight, which config"
    ):
        load(tmp_path)
    write(tmp_path)
    edit(
        tmp_path, {f"model.layers.{layer}.self_attn.o_proj.weight_scale": torch.ones(1) for layer in range(4)}
    )
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.\S+, .* and 1 more, which config"):
        load(tmp_path)
    write(tmp_path)
    edit(tmp_path, {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(32, 64)})
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.mlp\.experts\.0\.up_proj\.weight"):
        load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, {"model.norm.weight": torch.ones(65)})
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has shape \[65\], but config.json makes it \[64\]"
    ):
        load(tmp_path)
