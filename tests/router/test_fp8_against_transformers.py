"""An FP8 directory against its dequantised weights, in this model and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from router.model.loading import load_model
from tests.quantized_checkpoint import read_tensors, write_float, write_fp8
from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import write_checkpoint

VOCAB_SIZE = 512
# More than one block in most directions, and blocks cut off at the edges.
SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 300,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
}
CLASSES = {"v2": DeepseekV2ForCausalLM, "v3": DeepseekV3ForCausalLM}


@pytest.fixture(scope="module", params=CLASSES)
def directories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The FP8 directory, and what it stands for in float32."""
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(directory / "bf16", request.param, vocab_size=VOCAB_SIZE, mtp_layers=1, **SIZES)
    write_fp8(directory / "bf16", directory / "fp8")
    write_float(directory / "fp8", directory / "float")
    return directory / "fp8", directory / "float"


@torch.no_grad()
def test_logits_equal_those_of_transformers_with_the_dequantised_weights(
    directories: tuple[Path, Path],
) -> None:
    fp8, floats = directories
    ours = Driver(fp8, dtype="float32")
    theirs = CLASSES[ours.config.family].from_pretrained(floats, dtype=torch.float32).eval()
    prompts = random_prompts((1, 7, 33, 130), VOCAB_SIZE)
    found = ours.finish(*(ours.sequence(prompt) for prompt in prompts))
    for prompt, logits in zip(prompts, found, strict=True):
        torch.testing.assert_close(logits, theirs(torch.tensor([prompt])).logits[0, -1], atol=1e-4, rtol=0)


def test_weights_are_those_of_the_dequantised_directory_rounded_once(directories: tuple[Path, Path]) -> None:
    fp8, floats = (load_model(directory, "bfloat16", "cpu", lambda *_: None) for directory in directories)
    assert dict(fp8.named_parameters()).keys() == dict(floats.named_parameters()).keys()
    for name, parameter in fp8.named_parameters():
        assert torch.equal(parameter, floats.get_parameter(name)), name


def test_progress_counts_weights_and_their_scales(directories: tuple[Path, Path]) -> None:
    tensors = read_tensors(directories[0])
    own = (name for name in tensors if ".mlp.experts." not in name and "layers.3." not in name)
    expected = sum(tensors[name].nbytes for name in own)
    seen: list[tuple[int, int]] = []
    load_model(directories[0], "auto", "cpu", lambda *amounts: seen.append(amounts))
    assert (seen[0], seen[-1]) == ((0, expected), (expected, expected))


def test_bfloat16_logits_have_the_bits_of_the_dequantised_directory(directories: tuple[Path, Path]) -> None:
    fp8, floats = (Driver(directory, dtype="bfloat16") for directory in directories)
    prompts = random_prompts((5, 40), VOCAB_SIZE)
    found, expected = (
        driver.finish(*(driver.sequence(prompt) for prompt in prompts)) for driver in (fp8, floats)
    )
    assert torch.equal(found, expected)
