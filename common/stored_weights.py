"""The weights of a model directory by what they mean, whatever format they are stored in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from common.model_config import ModelConfig
from common.quantization import fp8
from common.quantization.description import FLOAT, read_description

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


class StoredWeights:
    """A checkpoint whose format is found out tensor by tensor: by its dtype and, for int8, a description.

    Attributes:
        checkpoint: the tensors as they are stored.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.checkpoint = Checkpoint(directory)
        self._block_size = config.weight_block_size
        self._description = read_description(directory)

    def type_of(self, path: str) -> str:
        """Return how the linear layer at `path` is stored: FLOAT, W8A8 or W8A8_DYNAMIC.

        Raises:
            CheckpointError: the description of a W8A8 checkpoint does not say, or gives another type.
        """
        return FLOAT if self._description is None else self._description.type_of(f"{path}.weight")

    def present(self, name: str) -> tuple[str, ...]:
        """Return the name if there is such a tensor, else nothing."""
        return (name,) if name in self.checkpoint else ()

    def norm_path(self, path: str) -> str:
        """Return where the norm at `path` is stored: older msModelSlim puts a changed one beside it."""
        return f"{path}.module" if f"{path}.module.weight" in self.checkpoint else path

    def float_names(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that make up one in floating point.

        Raises:
            CheckpointError: a tensor in FP8 has no scales.
        """
        if name not in self.checkpoint or self.checkpoint.dtype(name) != FP8:
            return (name,)
        if _scale_name(name) not in self.checkpoint:
            raise CheckpointError(
                f"{self.checkpoint.file(name)}: {name} is stored in {FP8}, but {_scale_name(name)} is missing"
            )
        return name, _scale_name(name)

    def float_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read a tensor into memory of its own, dequantised if it is stored in FP8, rounded to `dtype`.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is not stored in floating point.
        """
        stored = self.checkpoint.dtype(name)
        tensor = self.checkpoint.tensor(name, shape)
        if stored in FLOATS:
            return tensor.to(dtype)
        if stored != FP8 or len(shape) != 2:
            raise CheckpointError(
                f"{self.checkpoint.file(name)}: {name} is stored in {stored}, "
                f"but it must be in floating point"
            )
        if self._block_size is None:
            raise CheckpointError(
                f"{self.checkpoint.file(name)}: {name} is stored in {stored}, "
                f"but config.json has no quantization_config that gives a weight_block_size"
            )
        scale_name = self.float_names(name)[1]
        scale_inv = self.checkpoint.tensor(scale_name, fp8.scale_shape(shape, self._block_size))
        if scale_inv.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.checkpoint.file(scale_name)}: {scale_name} is stored in {scale_inv.dtype}, "
                f"but scales must be in floating point"
            )
        return fp8.dequantize_blocks(tensor, scale_inv, self._block_size, dtype)


def _scale_name(name: str) -> str:
    return f"{name}_scale_inv"
