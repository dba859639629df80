"""Turns a small checkpoint into FP8 blocks or W8A8, and both back into float32, naively and on its own.

Shares no arithmetic with the product: blocks are visited one by one, integers are multiplied out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_checkpoint import write_shards

LINEAR = re.compile(r".*(_proj|_proj_with_mqa)\.weight$")
ATTENTION = re.compile(r".*\.self_attn\.(?!kv_b_proj)\w+\.weight$")
FP8_MAX = 448.0
INPUT_SCALE, INPUT_OFFSET = 0.04, 5
"""Of static activations: [-5.3, 4.9], what a normalised row of a small model keeps to."""

DYNAMIC_LEAVES = ("weight_scale", "weight_offset")
STATIC_LEAVES = (*DYNAMIC_LEAVES, "input_scale", "input_offset", "quant_bias", "deq_scale")

Convert = Callable[[str, Tensor], dict[str, Tensor]]
"""What becomes of one tensor: new names and tensors."""


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_trained_like(source: Path, target: Path) -> None:
    """Write `source` with layers that add less to the residual stream, as those of a trained model do.

    What adds to it is scaled by 1 / sqrt(2 * layers), as such models are when training begins. With random
    weights of full size every layer drowns the last one, and the errors of all of them add up.
    """
    num_layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return {name: tensor * (2 * num_layers) ** -0.5 if adds else tensor}

    write_shards(target, _copy(source, target, convert, {}), num_shards=1)


def write_fp8(source: Path, target: Path, block_size: tuple[int, int] = (128, 128)) -> None:
    """Write `source` as DeepSeek publishes V3: linears in FP8 with a scale per block, the rest as it is."""

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not LINEAR.match(name):
            return {name: tensor}
        rows, columns = block_size
        scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        weight = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i, j, part in _blocks(tensor.float(), block_size):
            scales[i, j] = part.abs().max() / FP8_MAX
            weight[_block(i, j, block_size)] = (part / scales[i, j]).to(torch.float8_e4m3fn)
        return {name: weight, f"{name}_scale_inv": scales}

    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block_size),
    }
    tensors = _copy(source, target, convert, {"quantization_config": quantization})
    write_shards(target, tensors, num_shards=1)


def write_w8a8(
    source: Path,
    target: Path,
    *,
    mindie_format: bool = False,
    static_attention: bool = False,
    deq_dtype: torch.dtype = torch.float32,
    norm_biases: bool = False,
) -> None:
    """Write `source` as msModelSlim does: everything linear in int8 but kv_b_proj and lm_head.

    Args:
        mindie_format: the names of files and of the model that MindIE up to 2.1 wants.
        static_attention: W8A8 for the linears of attention, where they would be W8A8_DYNAMIC.
        deq_dtype: torch.int64 encodes deq_scale as for a float16 model.
        norm_biases: give the norms of layers a bias, as anti-outlier does.
    """
    biases = {name: one.double() for name, one in read_tensors(source).items() if name.endswith(".bias")}
    types: dict[str, str] = {}

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        is_static = static_attention and ATTENTION.match(name) is not None
        if not LINEAR.match(name) or "kv_b_proj" in name:
            converted, kind = {name: tensor}, "FLOAT"
            if norm_biases and name.endswith("layernorm.weight"):
                path = f"{name.removesuffix('.weight')}{'.module' if mindie_format else ''}"
                bias = 0.1 * torch.randn(len(tensor), generator=torch.Generator().manual_seed(len(types)))
                converted |= {f"{path}.weight": tensor * 1.5, f"{path}.bias": bias.to(tensor.dtype)}
        elif is_static:
            own = biases.get(name.replace(".weight", ".bias"))
            converted, kind = _static(name.removesuffix(".weight"), tensor, own, deq_dtype), "W8A8"
        else:
            converted, kind = _dynamic(name.removesuffix(".weight"), tensor), "W8A8_DYNAMIC"
        types.update(dict.fromkeys(converted, kind))
        return converted

    changes = {"quantize": "w8a8_dynamic", "mla_quantize": "w8a8"}
    tensors = _copy(
        source, target, convert, changes | ({"model_type": "deepseekv2"} if mindie_format else {})
    )
    stem = "quant_model_weight_w8a8_dynamic"
    write_shards(target, tensors, num_shards=1 if mindie_format else 2, stem=stem)
    described: dict[str, Any] = {"model_quant_type": "W8A8_DYNAMIC", **types}
    described |= {} if mindie_format else {"version": "1.0.0", "group_size": 0}
    suffix = "_w8a8_dynamic" if mindie_format else ""
    (target / f"quant_model_description{suffix}.json").write_text(json.dumps(described))


def write_float(source: Path, target: Path) -> None:
    """Write what the tensors of `source` stand for, in float32, for those who know no quantised format."""
    stored = read_tensors(source)
    config = json.loads((source / "config.json").read_text())
    block_size = tuple((config.get("quantization_config") or {}).get("weight_block_size", ()))

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        path, _, leaf = name.rpartition(".")
        if leaf in STATIC_LEAVES or leaf == "weight_scale_inv":
            return {}
        wide = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            for i, j, part in _blocks(wide, block_size):
                part.mul_(stored[f"{name}_scale_inv"][i, j])
        if tensor.dtype == torch.int8:
            wide *= stored[f"{path}.weight_scale"]
        return {name: wide}

    changes = {"quantization_config": None, "quantize": None, "mla_quantize": None, "torch_dtype": "float32"}
    write_shards(target, _copy(source, target, convert, changes), num_shards=1)


def _dynamic(path: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return {
        f"{path}.weight": (weight.float() / scale).round().to(torch.int8),
        f"{path}.weight_scale": scale,
        f"{path}.weight_offset": torch.zeros_like(scale),
    }


def _static(path: str, weight: Tensor, bias: Tensor | None, deq_dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = _dynamic(path, weight)
    input_scale = torch.tensor([INPUT_SCALE], dtype=torch.bfloat16)
    deq_scale = float(input_scale) * tensors[f"{path}.weight_scale"].flatten()
    row_sums = tensors[f"{path}.weight"].sum(dim=1, dtype=torch.int32)
    own = 0 if bias is None else (bias / deq_scale).round().to(torch.int32)
    if deq_dtype == torch.int64:
        deq_scale = torch.tensor([int(bits) for bits in deq_scale.view(torch.int32)], dtype=torch.int64)
    return tensors | {
        f"{path}.input_scale": input_scale,
        f"{path}.input_offset": torch.tensor([INPUT_OFFSET], dtype=torch.bfloat16),
        f"{path}.quant_bias": own - row_sums * INPUT_OFFSET,
        f"{path}.deq_scale": deq_scale,
    }


def _copy(source: Path, target: Path, convert: Convert, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Copy all but the weights, which are returned converted; a key of config.json that is None goes."""
    ignored = shutil.ignore_patterns("*.safetensors*", "config.json", "quant_model_description*")
    shutil.copytree(source, target, ignore=ignored)
    config = json.loads((source / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(source).items():
        tensors |= convert(name, tensor)
    return tensors


def _blocks(tensor: Tensor, block_size: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the position and a view of every block, those at the edges cut off."""
    rows, columns = block_size
    for i in range(-(-tensor.shape[0] // rows)):
        for j in range(-(-tensor.shape[1] // columns)):
            yield i, j, tensor[_block(i, j, (rows, columns))]


def _block(i: int, j: int, block_size: tuple[int, int]) -> tuple[slice, slice]:
    rows, columns = block_size
    return slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
