"""msModelSlim's W8A8 format: int8 weights, and what turns the sums of their products into numbers.

Shapes: N out-features, K in-features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from common.int8_reference import MAX_INT8, quantize_rows
from common.quantization.description import W8A8, W8A8_DYNAMIC

CALCULATED = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that scales are stored in."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A W8A8_DYNAMIC weight, symmetric: it stands for weight * scale. Rows are quantised one by one.

    Attributes:
        weight: [N, K] int8.
        scale: [N] float32.
    """

    weight: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> Int8Weight:
        """Return the same weight on another device."""
        return Int8Weight(self.weight.to(device), self.scale.to(device))


@dataclass(frozen=True, slots=True)
class StaticInt8Weight:
    """A W8A8 weight: (xq x weight + bias) * deq_scale, where xq = round(x / input_scale) + input_offset.

    Attributes:
        weight: [N, K] int8.
        input_scale: of every row.
        input_offset: a whole number from -128 to 127, whose share `bias` takes off again.
        bias: [N] int32: the layer's own bias is in it too.
        deq_scale: [N] float32: input_scale times the scale of the weight.
    """

    weight: Tensor
    input_scale: float
    input_offset: float
    bias: Tensor
    deq_scale: Tensor


def quantize_channels(weight: Tensor) -> Int8Weight:  # [N, K]
    """Quantise every out-feature for itself, by the formula that rows are quantised by."""
    return Int8Weight(*quantize_rows(weight))


def read_dynamic(checkpoint: Checkpoint, path: str, shape: tuple[int, int]) -> Int8Weight:
    """Read the W8A8_DYNAMIC weight of the linear layer at `path`.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or an offset is not zero.
    """
    weight = _read(checkpoint, path, "weight", [shape], (torch.int8,))
    _check_offset(checkpoint, path, shape[0])
    return Int8Weight(weight, _read_scale(checkpoint, path, "weight_scale", shape[0]))


def read_static(checkpoint: Checkpoint, path: str, shape: tuple[int, int]) -> StaticInt8Weight:
    """Read the W8A8 weight of the linear layer at `path`.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or a number is out of range.
    """
    num_out = shape[0]
    weight = _read(checkpoint, path, "weight", [shape], (torch.int8,))
    _check_offset(checkpoint, path, num_out)
    input_scale = float(_read(checkpoint, path, "input_scale", [(1,), ()], CALCULATED))
    input_offset = float(_read(checkpoint, path, "input_offset", [(1,), ()], (*CALCULATED, torch.int8)))
    if not 0 < input_scale < float("inf"):
        raise _error(checkpoint, f"{path}.input_scale", f"is {input_scale}, but it must be positive")
    if input_offset not in range(-MAX_INT8 - 1, MAX_INT8 + 1):
        raise _error(
            checkpoint, f"{path}.input_offset", f"is {input_offset}, but it must be a whole number of int8"
        )
    bias = _read(checkpoint, path, "quant_bias", [(num_out,)], (torch.int32,))
    deq_scale = _read_scale(checkpoint, path, "deq_scale", num_out, decode_deq_scale, torch.int64)
    return StaticInt8Weight(weight, input_scale, input_offset, bias, deq_scale)


def stored_names(checkpoint: Checkpoint, path: str, kind: str) -> tuple[str, ...]:
    """Return the tensors of the int8 linear layer at `path`, those included that nobody needs.

    Raises:
        CheckpointError: the weight is there, but something else it needs is not.
    """
    needed, others = TENSORS[kind]
    if f"{path}.weight" in checkpoint:
        for leaf in needed:
            _check_present(checkpoint, path, leaf)
    names = [f"{path}.{leaf}" for leaf in needed]
    return (*names, *(name for leaf in others if (name := f"{path}.{leaf}") in checkpoint))


TENSORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    W8A8_DYNAMIC: (("weight", "weight_scale"), ("weight_offset",)),
    W8A8: (
        ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale"),
        ("weight_scale", "weight_offset", "bias"),
    ),
}
"""What a linear layer of each type needs, and what may be beside it: a static bias is in quant_bias."""


def decode_deq_scale(stored: Tensor) -> Tensor:  # [N] -> [N] float32
    """Return the scales: models in float16 store the bits of a float32 in the lower half of an int64."""
    return stored.to(torch.int32).view(torch.float32) if stored.dtype == torch.int64 else stored.float()


def _read_scale(
    checkpoint: Checkpoint,
    path: str,
    leaf: str,
    num_out: int,
    decode: Callable[[Tensor], Tensor] = Tensor.float,
    *more_dtypes: torch.dtype,
) -> Tensor:
    shapes: list[tuple[int, ...]] = [(num_out,), (num_out, 1)]
    scale = decode(_read(checkpoint, path, leaf, shapes, (*CALCULATED, *more_dtypes)).flatten())
    if not bool(torch.isfinite(scale).all()):
        raise _error(checkpoint, f"{path}.{leaf}", "holds a scale that is not finite")
    return scale


def _check_offset(checkpoint: Checkpoint, path: str, num_out: int) -> None:
    name = f"{path}.weight_offset"
    if name not in checkpoint:
        return
    shapes: list[tuple[int, ...]] = [(num_out,), (num_out, 1)]
    if bool(_read(checkpoint, path, "weight_offset", shapes, (*CALCULATED, torch.int8)).any()):
        raise _error(checkpoint, name, "is not zero, but only symmetric weights are supported")


def _read(
    checkpoint: Checkpoint,
    path: str,
    leaf: str,
    shapes: list[tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...],
) -> Tensor:
    name = f"{path}.{leaf}"
    _check_present(checkpoint, path, leaf)
    if checkpoint.shape(name) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise _error(checkpoint, name, f"has shape {list(checkpoint.shape(name))}, but it must be {allowed}")
    if checkpoint.dtype(name) not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        raise _error(checkpoint, name, f"is stored in {checkpoint.dtype(name)}, but it must be in {allowed}")
    return checkpoint.tensor(name)


def _check_present(checkpoint: Checkpoint, path: str, leaf: str) -> None:
    name, weight = f"{path}.{leaf}", f"{path}.weight"
    if name not in checkpoint:
        where = checkpoint.file(weight) if weight in checkpoint else checkpoint.directory
        raise CheckpointError(f"{where}: {name} is missing, but {weight} is of a type that needs it")


def _error(checkpoint: Checkpoint, name: str, sentence: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.file(name)}: {name} {sentence}")
