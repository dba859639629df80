"""A W8A8 directory against its dequantised weights in transformers, and against the naive oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from common.errors import CheckpointError
from router.model.int8_linear import DynamicInt8MLP, StaticInt8Linear
from router.model.linear import Linear
from router.model.loading import load_model
from tests.oracle import Oracle
from tests.quantized_checkpoint import read_tensors, write_float, write_trained_like, write_w8a8
from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import write_checkpoint

VOCAB_SIZE = 512
LENGTHS = (1, 7, 16, 33, 80, 130, 200)
MAX_ERROR = 2e-2
CLASSES = {"v2": DeepseekV2ForCausalLM, "v3": DeepseekV3ForCausalLM}

WriteModel = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteModel:
    def write_model(family: str, overrides: dict[str, Any] | None = None, **options: Any) -> Path:
        sizes = {"vocab_size": VOCAB_SIZE, **(overrides or {})}
        write_checkpoint(tmp_path / "random", family, **sizes)
        write_trained_like(tmp_path / "random", tmp_path / "floats")
        write_w8a8(tmp_path / "floats", tmp_path / "w8a8", **options)
        return tmp_path / "w8a8"

    return write_model


def logits(directory: Path, dtype: str = "auto") -> Tensor:
    driver = Driver(directory, dtype=dtype)
    return driver.finish(*(driver.sequence(prompt) for prompt in random_prompts(LENGTHS, VOCAB_SIZE)))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", CLASSES)
def test_logits_are_close_to_those_of_transformers_with_the_dequantised_weights(
    write: WriteModel, family: str, static: bool, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    directory = write(family, static_attention=static)
    write_float(directory, directory.parent / "float")
    theirs = CLASSES[family].from_pretrained(directory.parent / "float", dtype=torch.float32).eval()
    prompts = random_prompts(LENGTHS, VOCAB_SIZE)
    expected = torch.stack([theirs(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    error = relative_error(logits(directory, dtype), expected)
    record_property("relative_error", error)
    # Rows are rounded to 255 steps before every product: this is what that costs, and no more.
    assert 1e-3 < error < MAX_ERROR


def test_both_generations_and_both_encodings_give_the_same_bits(write: WriteModel) -> None:
    first = write("v3", static_attention=True)
    expected = logits(first)
    for name, options in {
        "int64": {"deq_dtype": torch.int64},
        "mindie": {"mindie_format": True},
    }.items():
        write_w8a8(first.parent / "floats", first.parent / name, static_attention=True, **options)  # type: ignore[arg-type]
        assert torch.equal(logits(first.parent / name), expected), name


def test_layers_are_what_the_description_says_and_hold_no_weight_in_floating_point(write: WriteModel) -> None:
    model = load_model(write("v3", static_attention=True), "auto", "cpu", lambda *_: None)
    kinds = {path: type(module) for path, module in model.named_modules()}
    assert kinds["model.layers.0.mlp"] is DynamicInt8MLP
    assert kinds["model.layers.1.mlp.shared_experts"] is DynamicInt8MLP
    assert kinds["model.layers.2.self_attn.q_a_proj"] is StaticInt8Linear
    assert kinds["model.layers.2.self_attn.kv_b_proj"] is Linear
    assert kinds["lm_head"] is Linear
    left = [name for name, _ in model.named_parameters() if "_proj" in name]
    assert left == [f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in range(4)]


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "kv_a_proj_with_mqa"])
def test_a_static_layer_gives_the_bits_of_its_formula_in_64_bit_integers(
    write: WriteModel, name: str, device: str
) -> None:
    directory = write("v3", {"q_lora_rank": None, "attention_bias": True}, static_attention=True)
    model = load_model(directory, "float32", device, lambda *_: None)
    path = f"model.layers.1.self_attn.{name}"
    stored = read_tensors(directory)
    weight = stored[f"{path}.weight"].long()
    x = 3 * torch.randn(19, weight.shape[1])
    scale, offset = stored[f"{path}.input_scale"].float(), stored[f"{path}.input_offset"].float()
    rows = (torch.round(x / scale) + offset).clamp(-128, 127).long()
    sums = rows @ weight.T + stored[f"{path}.quant_bias"]
    assert torch.equal(model.get_submodule(path)(x), sums.float() * stored[f"{path}.deq_scale"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "kv_a_proj_with_mqa"])
def test_a_dynamic_layer_gives_the_bits_of_its_formula_and_adds_its_bias_before_rounding(
    write: WriteModel, name: str, dtype: str
) -> None:
    directory = write("v3", {"q_lora_rank": None, "attention_bias": True})
    model = load_model(directory, dtype, "cpu", lambda *_: None)
    path = f"model.layers.1.self_attn.{name}"
    stored = read_tensors(directory)
    weight = stored[f"{path}.weight"].long()
    x = torch.randn(19, weight.shape[1]).to(model.dtype)
    scales = x.float().abs().amax(dim=1) / 127
    sums = torch.round(x.float() / scales[:, None]).long() @ weight.T
    expected = sums.float() * stored[f"{path}.weight_scale"].flatten() * scales[:, None]
    if f"{path}.bias" in stored:
        expected += stored[f"{path}.bias"].float()
    assert torch.equal(model.get_submodule(path)(x), expected.to(model.dtype))


@pytest.mark.parametrize("mindie_format", [False, True], ids=["new", "old"])
def test_norms_with_a_bias_are_those_of_the_oracle(write: WriteModel, mindie_format: bool) -> None:
    directory = write("v3", norm_biases=True, mindie_format=mindie_format)
    floats = directory.parent / "float"
    write_float(directory, floats)
    oracle = Oracle(floats)
    oracle.is_v3 = True  # whatever name of the model the older format writes
    changed = {
        name.replace(".module.", "."): one for name, one in oracle.weights.items() if ".module." in name
    }
    oracle.weights |= changed
    assert bool(changed) == mindie_format
    prompts = random_prompts(LENGTHS, VOCAB_SIZE)
    expected = torch.stack([oracle.logits(prompt)[-1] for prompt in prompts])
    assert relative_error(logits(floats), expected.float()) < 1e-5


@pytest.mark.parametrize(
    ("leaf", "sentence"),
    [
        ("mlp.gate_proj.weight_scale", r"safetensors: \S+\.gate_proj\.weight_scale is missing, but"),
        ("self_attn.o_proj.deq_scale", r"safetensors: \S+\.o_proj\.deq_scale is missing, but"),
        ("self_attn.o_proj.weight", r"w8a8 lacks model\.layers\.0\.self_attn\.o_proj\.weight, which config"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_loaded(
    write: WriteModel, leaf: str, sentence: str
) -> None:
    directory = write("v3", static_attention=True, mindie_format=True)
    (file,) = directory.glob("*.safetensors")
    tensors = read_tensors(directory)
    del tensors[f"model.layers.0.{leaf}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=sentence):
        load_model(directory, "auto", "cpu", lambda *_: None)


def test_an_int8_kv_b_proj_is_refused_because_attention_takes_it_apart(write: WriteModel) -> None:
    directory = write("v3")
    description = directory / "quant_model_description.json"
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    description.write_text(description.read_text().replace(f'"{name}": "FLOAT"', f'"{name}": "W8A8_DYNAMIC"'))
    with pytest.raises(CheckpointError, match=rf"{name} is of type W8A8_DYNAMIC, but it must be FLOAT"):
        load_model(directory, "auto", "cpu", lambda *_: None)


def test_progress_counts_every_tensor_that_is_read(write: WriteModel) -> None:
    directory = write("v3")
    expected = sum(one.nbytes for name, one in read_tensors(directory).items() if ".mlp.experts." not in name)
    seen: list[tuple[int, int]] = []
    load_model(directory, "auto", "cpu", lambda *amounts: seen.append(amounts))
    assert (seen[0], seen[-1]) == ((0, expected), (expected, expected))
