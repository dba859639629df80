"""One call for a layer up to its experts: where it is made, and that it changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common import native_library
from router.model.deepseek import BiasedRMSNorm, DecoderLayer
from router.model.fused_decode import fuse_decode
from tests.quantized_checkpoint import write_w8a8
from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import write_checkpoint

VOCAB_SIZE = 512
LENGTHS = (1, 16, 40)
NATIVE = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason=str(native_library.why_unavailable())
)


def driver_of(directory: Path, family: str, dtype: str, **options: Any) -> Driver:
    write_checkpoint(directory / "floats", family, vocab_size=VOCAB_SIZE, torch_dtype=dtype)
    write_w8a8(directory / "floats", directory / "w8a8", **options)
    return Driver(directory / "w8a8")


def layers_of(driver: Driver) -> list[DecoderLayer]:
    return [layer for layer in driver.model.model.layers if isinstance(layer, DecoderLayer)]


def decode(driver: Driver) -> tuple[Tensor, Tensor]:
    """Return the logits of some decoding steps of several sequences, and their rows of the cache."""
    sequences = [driver.sequence(prompt, room=3) for prompt in random_prompts(LENGTHS, VOCAB_SIZE)]
    driver.finish(*sequences)
    logits = []
    for index in range(3):
        for sequence in sequences:
            sequence.tokens.append(100 * index + len(sequence.tokens))
        logits.append(driver.finish(*sequences))
    blocks = [block for sequence in sequences for block in sequence.block_table]
    cached = [driver.cache.layer(layer_id)[blocks] for layer_id in range(len(layers_of(driver)))]
    return torch.stack(logits), torch.stack(cached)


@NATIVE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["v2", "v3"])
def test_a_fused_layer_gives_the_logits_and_the_cache_of_its_parts(
    tmp_path: Path, family: str, dtype: str
) -> None:
    driver = driver_of(tmp_path, family, dtype)
    layers = layers_of(driver)
    assert all(layer.fused_decode is not None for layer in layers)
    assert {layer.has_experts for layer in layers} == {False, True}
    fused = decode(driver)
    for layer in layers:
        layer.fused_decode = None
    for found, expected in zip(fused, decode(driver), strict=True):
        assert torch.equal(found, expected)


@NATIVE
def test_a_norm_of_latents_may_have_a_bias(tmp_path: Path) -> None:
    driver = driver_of(tmp_path, "v2", "bfloat16")
    generator = torch.Generator().manual_seed(1)
    for layer in layers_of(driver):
        norm = BiasedRMSNorm(layer.self_attn.kv_a_layernorm)
        norm.weight = layer.self_attn.kv_a_layernorm.weight
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
        layer.self_attn.kv_a_layernorm = norm
    unbiased = decode(driver)
    fuse_decode(driver.model)
    fused = decode(driver)
    assert not torch.equal(fused[0], unbiased[0])
    for layer in layers_of(driver):
        assert layer.fused_decode is not None
        layer.fused_decode = None
    for found, expected in zip(fused, decode(driver), strict=True):
        assert torch.equal(found, expected)


def test_layers_of_other_weights_are_run_part_by_part(tmp_path: Path) -> None:
    static = driver_of(tmp_path / "static", "v3", "bfloat16", static_attention=True)
    floats = Driver(tmp_path / "static" / "floats")
    biased = driver_of(tmp_path / "biased", "v3", "bfloat16")
    for layer in layers_of(biased):
        layer.fused_decode = None
        layer.input_layernorm = BiasedRMSNorm(layer.input_layernorm)
    fuse_decode(biased.model)
    for driver in (static, floats, biased):
        assert all(layer.fused_decode is None for layer in layers_of(driver))
