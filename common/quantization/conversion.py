"""Writes a checkpoint anew in W8A8, in msModelSlim's layout, a tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint_writer import CheckpointWriter
from common.errors import CheckpointError
from common.model_config import INT8_KEYS, ModelConfig
from common.model_json import read_json_object
from common.quantization.description import FLOAT, W8A8_DYNAMIC, find_description
from common.quantization.plan import STEM, Conversion, plan_conversions, plan_files
from common.quantization.w8a8 import quantize_channels
from common.stored_weights import FP8, StoredWeights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_FILE_BYTES = 4 * 2**30
BAND_ROWS = 1024
"""Out-features that are in float32 at the same time."""
COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
"""Tokenizer, generation and the like. No code: nothing of a checkpoint is ever executed."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far an int8 weight is from what it was: the norm of the difference by the norm of the weight."""

    name: str
    relative_error: float

    @property
    def group(self) -> str:
        """What all layers and experts call it."""
        return re.sub(r"\.\d+\.", ".*.", re.sub(r"^model\.layers\.\d+\.", "", self.name))


def quantize_checkpoint(
    source: Path,
    target: Path,
    on_progress: Callable[[int, int], None],
    int8_lm_head: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[TensorError]:
    """Write `source` to the new directory `target`; return the errors of the tensors that became int8.

    config.json comes last: a directory without it was interrupted.

    Args:
        source: in bf16, fp16, fp32 or FP8.
        target: must not exist, or be empty.
        on_progress: called with the bytes written so far and in all.
        int8_lm_head: whether lm_head becomes int8 too.
        max_file_bytes: of one file of tensors, if no single tensor is larger.

    Raises:
        CheckpointError: the source cannot be read or is W8A8 already, or the target cannot be written.
    """
    config = ModelConfig.from_directory(source)
    _check_directories(source, target)
    weights = StoredWeights(source, config)
    dtype = DTYPES.get(config.dtype_name, torch.bfloat16)
    has_lm_head = not config.tie_word_embeddings
    conversions = plan_conversions(weights.checkpoint, dtype, int8_lm_head and has_lm_head)
    files = plan_files(conversions, max_file_bytes)
    total = sum(conversion.num_bytes for conversion in conversions)
    _make_room(target, total)
    errors: list[TensorError] = []
    written = 0
    on_progress(written, total)
    for file_name, own in files.items():
        planned = [tensor for conversion in own for tensor in conversion.outputs]
        with CheckpointWriter(target / file_name, planned) as writer:
            for conversion in own:
                for name, tensor in CONVERT[conversion.kind](weights, conversion, errors):
                    writer.write(name, tensor)
                written += conversion.num_bytes
                on_progress(written, total)
    _write_json(target / f"{STEM}.safetensors.index.json", _index(files, total))
    _write_json(target / "quant_model_description.json", _description(conversions))
    _copy_companions(source, target)
    _write_json(
        target / "config.json", _config(read_json_object(source / "config.json"), config, conversions)
    )
    return errors


def _keep(
    weights: StoredWeights, conversion: Conversion, errors: list[TensorError]
) -> Iterator[tuple[str, Tensor]]:
    (output,) = conversion.outputs
    if weights.checkpoint.dtype(conversion.source) == FP8:
        yield output.name, weights.float_tensor(output.name, output.shape, output.dtype)
    else:
        yield output.name, weights.checkpoint.tensor(output.name)


def _quantize(
    weights: StoredWeights, conversion: Conversion, errors: list[TensorError]
) -> Iterator[tuple[str, Tensor]]:
    weight_output, scale_output, offset_output = conversion.outputs
    stored = weights.checkpoint.dtype(conversion.source)
    read_as = torch.float32 if stored == FP8 else stored
    weight = weights.float_tensor(conversion.source, weight_output.shape, read_as)
    quantised = torch.empty(weight_output.shape, dtype=torch.int8)
    scale = torch.empty(scale_output.shape)
    error = norm = 0.0
    for first in range(0, len(weight), BAND_ROWS):
        band = slice(first, first + BAND_ROWS)
        wide = weight[band].float()
        part = quantize_channels(wide)
        quantised[band], scale[band] = part.weight, part.scale.unsqueeze(1)
        error += float((part.weight * scale[band] - wide).double().square().sum())
        norm += float(wide.double().square().sum())
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(
            f"{weights.checkpoint.file(conversion.source)}: {conversion.source} holds a number that is not "
            f"finite, but only finite weights can be quantised"
        )
    errors.append(TensorError(conversion.source, (error / norm) ** 0.5 if norm else 0.0))
    yield weight_output.name, quantised
    yield scale_output.name, scale
    yield offset_output.name, torch.zeros(offset_output.shape)


Convert = Callable[[StoredWeights, Conversion, list[TensorError]], Iterator[tuple[str, Tensor]]]

CONVERT: dict[str, Convert] = {FLOAT: _keep, W8A8_DYNAMIC: _quantize}


def _check_directories(source: Path, target: Path) -> None:
    if find_description(source) is not None:
        raise CheckpointError(f"{source} is quantised already: give the checkpoint it was made from")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory: name a new one")


def _make_room(target: Path, num_bytes: int) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error.strerror}") from None
    free = shutil.disk_usage(target).free
    if free < num_bytes:
        raise CheckpointError(
            f"{target} has room for {free} bytes, but the weights will take {num_bytes}: free some space"
        )


def _index(files: Mapping[str, Sequence[Conversion]], total: int) -> dict[str, Any]:
    weight_map = {
        tensor.name: file_name
        for file_name, own in files.items()
        for conversion in own
        for tensor in conversion.outputs
    }
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _description(conversions: Sequence[Conversion]) -> dict[str, Any]:
    types = {tensor.name: conversion.kind for conversion in conversions for tensor in conversion.outputs}
    return {"model_quant_type": W8A8_DYNAMIC, "version": "1.0.0", "group_size": 0, **types}


def _config(raw: dict[str, Any], config: ModelConfig, conversions: Sequence[Conversion]) -> dict[str, Any]:
    """Return config.json with what msModelSlim adds; what it said about FP8 is no longer true."""
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    has_mtp = any(conversion.source.startswith(first_mtp) for conversion in conversions)
    changed = {key: value for key, value in raw.items() if key != "quantization_config"}
    keys = INT8_KEYS if has_mtp else INT8_KEYS[:2]
    return changed | dict.fromkeys(keys, W8A8_DYNAMIC.lower())


def _copy_companions(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        is_index = file.name.endswith(".safetensors.index.json")
        is_text = file.suffix in COPIED_SUFFIXES and not is_index and file.name != "config.json"
        if file.is_file() and (is_text or file.name.startswith("LICENSE")):
            shutil.copyfile(file, target / file.name)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
