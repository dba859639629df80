"""FP8 blocks become what a loop over blocks makes of them, in little memory, and are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import CheckpointError
from common.model_config import ModelConfig
from common.quantization.fp8 import dequantize_blocks, scale_shape
from common.stored_weights import StoredWeights
from tests.quantized_checkpoint import write_fp8
from tests.tiny_checkpoint import write_checkpoint

NAME = "model.layers.0.mlp.gate_proj.weight"
SCALE_NAME = f"{NAME}_scale_inv"
SHAPE = (192, 160)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": SHAPE[1], "intermediate_size": SHAPE[0], "num_hidden_layers": 2}
    write_checkpoint(tmp_path / "bf16", "v3", vocab_size=128, **sizes)
    write_fp8(tmp_path / "bf16", tmp_path / "fp8")
    return tmp_path / "fp8"


def read(directory: Path, shape: tuple[int, ...] = SHAPE, name: str = NAME) -> Tensor:
    weights = StoredWeights(directory, ModelConfig.from_directory(directory))
    return weights.float_tensor(name, shape, torch.float32)


def edit(directory: Path, changes: dict[str, Tensor | None]) -> None:
    file = directory / "model.safetensors"
    tensors: dict[str, Tensor | None] = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((256, 128), (128, 128)), ((300, 130), (128, 128)), ((5, 7), (128, 128)), ((9, 10), (4, 3))],
)
def test_every_element_is_multiplied_by_the_scale_of_its_block(
    shape: tuple[int, int], block_size: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_shape(shape, block_size))
    found = dequantize_blocks(weight, scales, block_size, dtype)
    for row in range(0, shape[0], 7):
        for column in range(0, shape[1], 5):
            scale = scales[row // block_size[0], column // block_size[1]]
            assert found[row, column] == (weight[row, column].float() * scale).to(dtype)


def test_dequantised_weights_are_those_that_were_quantised_but_for_three_bits_of_mantissa(
    checkpoint: Path,
) -> None:
    original = read(checkpoint.parent / "bf16")
    error = (read(checkpoint) - original).norm() / original.norm()
    assert 0.01 < float(error) < 2.0**-4  # e4m3 rounds to 1/16 of the value at most


def test_a_weight_without_scales_is_named(checkpoint: Path) -> None:
    edit(checkpoint, {SCALE_NAME: None})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {NAME} is .*, but {SCALE_NAME} is miss"):
        read(checkpoint)


def test_scales_of_a_wrong_shape_are_named(checkpoint: Path) -> None:
    edit(checkpoint, {SCALE_NAME: torch.ones(2, 1)})
    with pytest.raises(CheckpointError, match=rf"safetensors: {SCALE_NAME} has shape \[2, 1\], .* \[2, 2\]"):
        read(checkpoint)


def test_scales_that_are_no_floats_are_named(checkpoint: Path) -> None:
    edit(checkpoint, {SCALE_NAME: torch.ones(2, 2, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=rf"safetensors: {SCALE_NAME} is stored in torch\.int32"):
        read(checkpoint)


def test_fp8_without_a_configuration_that_says_so_is_named(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config=None)
    with pytest.raises(CheckpointError, match=rf"{NAME} is stored in torch\.float8_e4m3fn, but config\.json"):
        read(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_weights_in_a_format_nobody_described_are_named(checkpoint: Path, dtype: torch.dtype) -> None:
    edit(checkpoint, {NAME: torch.ones(SHAPE).to(dtype)})
    with pytest.raises(CheckpointError, match=rf"{NAME} is stored in {dtype}, but it must be in floating"):
        read(checkpoint)


def test_a_vector_cannot_be_in_blocks(checkpoint: Path) -> None:
    name = "model.norm.weight"
    edit(checkpoint, {name: torch.ones(160).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"{name} is stored in torch\.float8_e4m3fn, but it must be"):
        read(checkpoint, (160,), name)
