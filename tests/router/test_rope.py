"""The rotary table: the same bits however it grew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from common.model_config import ModelConfig
from router.model.rope import RotaryTable, softmax_scale
from tests.tiny_checkpoint import COMMON, FAMILIES, YARN


def config(directory: Path, **overrides: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(COMMON | FAMILIES["v3"] | overrides))
    return ModelConfig.from_directory(directory)


def test_a_table_that_grew_in_steps_equals_one_that_grew_at_once(tmp_path: Path) -> None:
    stepwise, at_once = RotaryTable(config(tmp_path)), RotaryTable(config(tmp_path))
    positions = torch.tensor([0, 1, 255, 256, 999, 5000])
    for length in (1, 2, 300, 1000, 5001):
        stepwise.lookup(torch.tensor([length - 1]), length)
    for first, second in zip(stepwise.lookup(positions, 5001), at_once.lookup(positions, 5001), strict=True):
        assert torch.equal(first, second)


def test_cos_and_sin_are_right_at_the_far_end_of_the_context(tmp_path: Path) -> None:
    table = RotaryTable(config(tmp_path))
    cos, sin = table.lookup(torch.tensor([163839]), 163840)
    # mscale equals mscale_all_dim: the quotient is 1, and the softmax has all of it.
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    assert softmax_scale(config(tmp_path)) > 32**-0.5


@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_the_whole_table_equals_transformers(tmp_path: Path, mscale: float) -> None:
    ours = RotaryTable(config(tmp_path, rope_scaling=YARN | {"mscale": mscale}))
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_pretrained(tmp_path))
    positions = torch.tensor([0, 1, 4095, 4096, 50_001, 163_839])
    for mine, other in zip(
        ours.lookup(positions, 163_840), theirs(torch.empty(1), positions[None]), strict=True
    ):
        torch.testing.assert_close(mine, other[0, :, : mine.shape[1]], atol=1e-6, rtol=0)
