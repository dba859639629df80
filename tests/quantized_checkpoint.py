"""Turns a small checkpoint into FP8 blocks, and anything quantised back into float32, naively and on its own.

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
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r".*(_proj|_proj_with_mqa)\.weight$")
FP8_MAX = 448.0

Convert = Callable[[str, Tensor], dict[str, Tensor]]
"""What becomes of one tensor: new names and tensors."""


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


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
    rewrite(source, target, convert, {"quantization_config": quantization})


def write_float(source: Path, target: Path) -> None:
    """Write what the tensors of `source` stand for, in float32, for those who know no quantised format."""
    tensors = read_tensors(source)
    config = json.loads((source / "config.json").read_text())
    block_size = tuple((config.get("quantization_config") or {}).get("weight_block_size", ()))

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name.endswith("_scale_inv"):
            return {}
        wide = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            for i, j, part in _blocks(wide, block_size):
                part.mul_(tensors[f"{name}_scale_inv"][i, j])
        return {name: wide}

    rewrite(source, target, convert, {"quantization_config": None, "torch_dtype": "float32"})


def rewrite(
    source: Path,
    target: Path,
    convert: Convert,
    config_changes: dict[str, Any],
    weights_file: str = "model.safetensors",
) -> dict[str, Tensor]:
    """Write a directory whose tensors and configuration are those of `source`, changed; return those."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    config = json.loads((source / "config.json").read_text()) | config_changes
    config = {key: value for key, value in config.items() if key not in config_changes or value is not None}
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(source).items():
        tensors |= convert(name, tensor)
    save_file(tensors, target / weights_file)
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
