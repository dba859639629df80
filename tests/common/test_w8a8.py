"""W8A8 directories of msModelSlim: what is read from which file, and what is refused, by file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import CheckpointError
from common.model_config import ModelConfig
from common.quantization.description import FLOAT, W8A8, W8A8_DYNAMIC
from common.quantization.row_format import int8_layers
from common.quantization.w8a8 import decode_deq_scale, quantize_channels, read_dynamic, read_static
from common.stored_weights import StoredWeights
from tests.quantized_checkpoint import INPUT_OFFSET, INPUT_SCALE, read_tensors, write_w8a8
from tests.tiny_checkpoint import write_checkpoint

DYNAMIC, STATIC = "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.o_proj"
SHAPE = (128, 64)  # of both


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "bf16"
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 128, "v_head_dim": 16}
    write_checkpoint(directory, "v3", vocab_size=128, intermediate_size=64, **sizes)
    return directory


@pytest.fixture
def checkpoint(floats: Path, tmp_path: Path) -> Path:
    """A directory with one file of weights, so that tests can change it."""
    write_w8a8(floats, tmp_path / "w8a8", mindie_format=True, static_attention=True)
    return tmp_path / "w8a8"


def opened(directory: Path) -> StoredWeights:
    return StoredWeights(directory, ModelConfig.from_directory(directory))


def edit(directory: Path, changes: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor | None] = {**read_tensors(directory), **changes}
    (file,) = directory.glob("*.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def edit_description(directory: Path, **changes: str) -> None:
    (file,) = directory.glob("quant_model_description*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("mindie_format", [False, True])
def test_both_generations_of_file_names_are_found_and_read_alike(
    floats: Path, tmp_path: Path, mindie_format: bool
) -> None:
    write_w8a8(floats, tmp_path / "w8a8", mindie_format=mindie_format, static_attention=True)
    names = sorted(path.name for path in (tmp_path / "w8a8").glob("quant_model*"))
    assert names == (
        ["quant_model_description_w8a8_dynamic.json", "quant_model_weight_w8a8_dynamic.safetensors"]
        if mindie_format
        else [
            "quant_model_description.json",
            "quant_model_weight_w8a8_dynamic-00001-of-00002.safetensors",
            "quant_model_weight_w8a8_dynamic-00002-of-00002.safetensors",
            "quant_model_weight_w8a8_dynamic.safetensors.index.json",
        ]
    )
    weights = opened(tmp_path / "w8a8")
    assert ModelConfig.from_directory(tmp_path / "w8a8").family == "v3"
    paths = (DYNAMIC, STATIC, "model.layers.0.self_attn.kv_b_proj")
    assert [weights.type_of(path) for path in paths] == [W8A8_DYNAMIC, W8A8, FLOAT]
    stored = read_tensors(tmp_path / "w8a8")
    read = read_dynamic(weights.checkpoint, DYNAMIC, SHAPE[::-1])
    assert torch.equal(read.weight, stored[f"{DYNAMIC}.weight"])
    assert torch.equal(read.scale, stored[f"{DYNAMIC}.weight_scale"].flatten())


@pytest.mark.parametrize("deq_dtype", [torch.float32, torch.int64])
def test_static_scales_are_read_in_both_encodings(
    floats: Path, tmp_path: Path, deq_dtype: torch.dtype
) -> None:
    write_w8a8(floats, tmp_path / "w8a8", static_attention=True, deq_dtype=deq_dtype)
    stored = read_tensors(tmp_path / "w8a8")
    assert stored[f"{STATIC}.deq_scale"].dtype == deq_dtype
    read = read_static(opened(tmp_path / "w8a8").checkpoint, STATIC, SHAPE)
    input_scale = float(torch.tensor(INPUT_SCALE, dtype=torch.bfloat16))
    assert (read.input_scale, read.input_offset) == (input_scale, INPUT_OFFSET)
    assert torch.equal(read.deq_scale, input_scale * stored[f"{STATIC}.weight_scale"].flatten())
    assert torch.equal(read.bias, -INPUT_OFFSET * read.weight.sum(dim=1, dtype=torch.int32))


def test_the_bits_of_a_float_are_in_the_lower_half_of_an_integer() -> None:
    # 0x3F800000 is 1.0, 0x3C23D70A is 0.01 and 0x00000001 is the smallest number, written by hand.
    stored = torch.tensor([0x3F800000, 0x3C23D70A, 1])
    assert decode_deq_scale(stored).tolist() == [1.0, float(torch.tensor(0.01)), 2.0**-149]
    assert decode_deq_scale(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


def test_channels_are_quantised_symmetrically_to_127() -> None:
    weight = torch.tensor([[2.54, -1.27, 0.0], [0.0, 0.0, 0.0]])
    quantised = quantize_channels(weight)
    # -1.27 is 63.5 steps: the even number is -64.
    assert quantised.weight.tolist() == [[127, -64, 0], [0, 0, 0]]
    torch.testing.assert_close(quantised.scale, torch.tensor([0.02, 0.0]))


BAD_DYNAMIC: list[tuple[str, Tensor | None, str]] = [
    ("weight_scale", None, r"weight_scale is missing, but \S+weight is of a type that needs it"),
    ("weight_scale", torch.ones(64, 2), r"has shape \[64, 2\], but it must be \[64\] or \[64, 1\]"),
    ("weight_scale", torch.ones(64, dtype=torch.int32), "is stored in torch.int32, but it must be in"),
    ("weight_scale", torch.full((64,), float("nan")), "holds a scale that is not finite"),
    ("weight_offset", torch.ones(64, 1), "is not zero, but only symmetric weights are supported"),
    ("weight_offset", torch.zeros(1), r"has shape \[1\], but it must be \[64\]"),
    ("weight", torch.ones(64, 128), "is stored in torch.float32, but it must be in torch.int8"),
    ("weight", torch.ones(64, 127, dtype=torch.int8), r"has shape \[64, 127\], but it must be \[64, 128\]"),
]

BAD_STATIC: list[tuple[str, Tensor | None, str]] = [
    ("deq_scale", None, "deq_scale is missing"),
    ("quant_bias", None, "quant_bias is missing"),
    ("input_scale", None, "input_scale is missing"),
    ("input_scale", torch.zeros(1), "is 0.0, but it must be positive"),
    ("input_scale", torch.ones(2), r"has shape \[2\], but it must be \[1\]"),
    ("input_offset", torch.tensor([0.5]), "is 0.5, but it must be a whole number of int8"),
    ("input_offset", torch.tensor([200.0]), "is 200.0, but it must be a whole number of int8"),
    ("quant_bias", torch.zeros(128), "is stored in torch.float32, but it must be in torch.int32"),
    ("deq_scale", torch.ones(128, dtype=torch.int32), "is stored in torch.int32, but it must be in"),
    ("deq_scale", torch.ones(127), r"has shape \[127\], but it must be \[128\]"),
    ("weight_offset", torch.ones(128, 1), "is not zero"),
]


@pytest.mark.parametrize(
    ("path", "read", "leaf", "tensor", "sentence"),
    [(DYNAMIC, read_dynamic, *bad) for bad in BAD_DYNAMIC]
    + [(STATIC, read_static, *bad) for bad in BAD_STATIC],
)
def test_a_bad_tensor_is_one_sentence_with_file_and_tensor(
    checkpoint: Path, path: str, read: Callable[..., object], leaf: str, tensor: Tensor | None, sentence: str
) -> None:
    edit(checkpoint, {f"{path}.{leaf}": tensor})
    shape = SHAPE if path == STATIC else SHAPE[::-1]
    with pytest.raises(CheckpointError, match=sentence) as error:
        read(opened(checkpoint).checkpoint, path, shape)
    (file,) = checkpoint.glob("*.safetensors")
    assert str(error.value).startswith(f"{file}: {path}.{leaf} ")
    assert "\n" not in str(error.value)


def test_a_type_that_is_not_supported_or_not_given_is_named_with_the_description(checkpoint: Path) -> None:
    edit_description(checkpoint, **{f"{DYNAMIC}.weight": "W4A8_DYNAMIC"})
    with pytest.raises(CheckpointError, match=rf"_dynamic\.json: the type of {DYNAMIC}\.weight is 'W4A8_DYN"):
        opened(checkpoint).type_of(DYNAMIC)
    with pytest.raises(CheckpointError, match=r"_dynamic\.json says nothing about model\.layers\.0\.new"):
        opened(checkpoint).type_of("model.layers.0.new")


def test_rows_go_to_the_experts_in_int8_only_where_all_experts_of_the_layer_are_dynamic_int8(
    floats: Path, checkpoint: Path
) -> None:
    config = ModelConfig.from_directory(checkpoint)
    assert int8_layers(floats, config) == set()
    assert int8_layers(checkpoint, config) == set(config.moe_layer_ids) == {1}
    last = f"model.layers.1.mlp.experts.{config.n_routed_experts - 1}"
    for kind in (FLOAT, W8A8):
        edit_description(checkpoint, **{f"{last}.up_proj.weight": kind})
        assert int8_layers(checkpoint, config) == set()


def test_two_descriptions_or_two_indexes_are_refused(checkpoint: Path) -> None:
    (checkpoint / "quant_model_description.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds quant_model_description\.json and quant_model_descr"):
        opened(checkpoint)
    (checkpoint / "quant_model_description.json").unlink()
    for name in ("a", "b"):
        (checkpoint / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a\.safetensors\.index\.json and b\.safetensors\.ind"):
        opened(checkpoint)


def test_a_description_that_is_no_object_is_named(checkpoint: Path) -> None:
    (checkpoint / "quant_model_description_w8a8_dynamic.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"_w8a8_dynamic\.json holds a list, but it must hold a JSON"):
        opened(checkpoint)


def test_int8_weights_that_the_description_calls_float_are_refused(checkpoint: Path) -> None:
    edit_description(checkpoint, **{f"{DYNAMIC}.weight": FLOAT})
    weights = opened(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{DYNAMIC}\.weight is stored in torch\.int8, but it must be"):
        weights.float_tensor(f"{DYNAMIC}.weight", SHAPE[::-1], torch.float32)
