"""Writes a file of safetensors whose tensors arrive one at a time: the file is never held in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import DTYPES
from common.errors import CheckpointError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointWriter:
    """A file with a place for every planned tensor. Closing it checks that all of them were written."""

    def __init__(self, file: Path, planned: Sequence[PlannedTensor]) -> None:
        # The widest numbers first: readers that map the file want every tensor aligned to its numbers.
        ordered = sorted(planned, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[PlannedTensor, int]] = {}
        offset = 0
        for tensor in ordered:
            end = offset + tensor.num_bytes
            header[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            self._places[tensor.name] = (tensor, offset)
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._path = file
        self._file = file.open("wb", buffering=0)
        self._write_all(memoryview(struct.pack("<Q", len(text)) + text))
        self._file.truncate(self._start + offset)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place.

        Raises:
            CheckpointError: it is not what was planned, or was written before.
        """
        planned, offset = self._places.pop(name, (None, 0))
        if planned is None or (planned.dtype, planned.shape) != (tensor.dtype, tuple(tensor.shape)):
            raise CheckpointError(
                f"{self._path}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"but the plan of the file has {planned}"
            )
        self._file.seek(self._start + offset)
        if planned.num_bytes:
            self._write_all(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None and self._places:
            raise CheckpointError(
                f"{self._path} lacks {next(iter(self._places))}, which its header announces"
            )

    def _write_all(self, content: memoryview) -> None:
        while len(content):
            content = content[self._file.write(content) :]
