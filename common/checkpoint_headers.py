"""What the headers of a checkpoint's safetensors files say: names, types, shapes and places. Torch-free.

Only JSON is read; nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one number by the name that the format gives its type."""

MAX_HEADER_BYTES = 100 * 2**20
"""The format's own limit; a larger number means that the file is something else."""

INDEX_PATTERN = "*.safetensors.index.json"
"""Hugging Face names the index of its shards after the model, msModelSlim after the format."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `offset` and `num_bytes` count bytes of `file`; `dtype` is a key of ITEM_BYTES."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """The numbers it holds."""
        return math.prod(self.shape)


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Find every tensor of a model directory, in the order of the files.

    Raises:
        CheckpointError: no safetensors files, or one is missing, damaged, or not what its index says.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: a checkpoint must be one")
    if (directory / "model.safetensors").is_file():
        return _read_shards([directory / "model.safetensors"])
    if (index := _find_index(directory)) is not None:
        return _read_indexed(index)
    return _read_shards(_unindexed_files(directory))


def _find_index(directory: Path) -> Path | None:
    found = sorted(directory.glob(INDEX_PATTERN))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory} holds {found[0].name} and {found[1].name}, but it must hold one checkpoint: "
            f"move the other one away"
        )
    return found[0] if found else None


def _unindexed_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in directory.glob(suffix))
    if pickles:
        raise CheckpointError(
            f"{directory} holds {pickles[0]} and no safetensors file, but pickled weights can run code "
            f"and are never read: convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{directory} holds no safetensors file: is it a model directory?")


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    files = {}
    for file_name in dict.fromkeys(weight_map.values()):
        file = index.parent / file_name
        if Path(file_name).name != file_name:
            raise CheckpointError(f"{index} names {file_name!r}, but a shard must lie beside its index")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, but {index.name} names it: copy the shard again")
        files[file_name] = dict(_read_header(file))
    tensors = {}
    for name, file_name in weight_map.items():
        if name not in files[file_name]:
            raise CheckpointError(
                f"{index.parent / file_name} has no tensor {name}, but {index.name} says so"
            )
        tensors[name] = files[file_name][name]
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files")
    return weight_map


def _read_shards(files: Sequence[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in _read_header(file):
            if name in tensors:
                raise CheckpointError(
                    f"{name} is in {tensors[name].file} and in {file}, but it must be in one"
                )
            tensors[name] = stored
    return tensors


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of one file, after checking that the file is as long as they need."""
    header, data_start, size = _parse_header(file)
    header.pop("__metadata__", None)
    end = data_start
    for name, entry in header.items():
        try:
            stored = _stored_tensor(file, entry, data_start)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the header entry of {name} is damaged: {error}") from None
        end = max(end, stored.offset + stored.num_bytes)
        yield name, stored
    if end != size:
        problem = "truncated" if end > size else "damaged"
        raise CheckpointError(
            f"{file} is {problem}: it has {size} bytes where its header needs {end}: copy the file again"
        )


def _parse_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, where the numbers begin, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) == 8 and length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} is not a safetensors file: its header would have {length} bytes"
                )
            if size < 8 + length or length < 2:
                raise CheckpointError(
                    f"{file} is truncated: it has {size} bytes, but its header alone needs "
                    f"{max(8 + length, 10)}: copy the file again"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length, size


def _stored_tensor(file: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    dtype = entry["dtype"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(ITEM_BYTES)}")
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(number, int) for number in (*shape, begin, end)):
        raise ValueError(f"shape {list(shape)} and bytes {begin} to {end} must be whole numbers")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != num_bytes:
        raise ValueError(f"{dtype} of shape {list(shape)} cannot lie in bytes {begin} to {end}")
    return StoredTensor(file, dtype, shape, data_start + begin, num_bytes)
