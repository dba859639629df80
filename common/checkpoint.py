"""A Hugging Face checkpoint of safetensors files: names, shapes, and one tensor at a time.

Only JSON and raw numbers are read; nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint_headers import StoredTensor, read_headers
from common.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """The tensors of one model directory. Opening reads headers only; a tensor is read when it is asked for.

    Files are read, not mapped: what a process holds is what it asked for, and nothing of the rest of a shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._tensors = read_headers(self.directory)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the checkpoint, in the order of the files."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def file(self, name: str) -> Path:
        """The file a tensor lies in."""
        return self._stored(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in."""
        return DTYPES[self._stored(name).dtype]

    def num_elements(self, name: str) -> int:
        """The number of elements of a tensor."""
        return self._stored(name).num_elements

    def num_bytes(self, name: str) -> int:
        """The size of a tensor in its file."""
        return self._stored(name).num_bytes

    def tensor(self, name: str, expected_shape: Sequence[int] | None = None) -> Tensor:
        """Read one tensor into memory of its own, in the dtype it is stored in.

        Raises:
            CheckpointError: there is no such tensor, its shape is another one, or its file has shrunk.
        """
        stored = self._stored(name)
        if expected_shape is not None and stored.shape != tuple(expected_shape):
            raise CheckpointError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, "
                f"but config.json makes it {list(expected_shape)}"
            )
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if stored.num_bytes:
            _read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, stored)
        return tensor

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}, but the model in its config.json needs it"
            ) from None


def _read_into(buffer: memoryview, stored: StoredTensor) -> None:
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        while len(buffer):
            count = file.readinto(buffer)
            if not count:
                raise CheckpointError(f"{stored.file} ended while it was read: copy the file again")
            buffer = buffer[count:]
