"""Tensors come back bit for bit, and every kind of damaged directory is one sentence that names the file."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.checkpoint import Checkpoint
from common.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(directory: Path) -> None:
    first = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.randn(3, 5).bfloat16()}
    second = {"c": torch.tensor(7, dtype=torch.int64), "d": torch.empty(0, 4), "e": torch.randn(4).half()}
    weight_map: dict[str, str] = {}
    for file_name, tensors in zip(SHARDS, (first, second), strict=True):
        save_file(tensors, directory / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_tensors_of_every_layout_come_back_bit_for_bit(tmp_path: Path) -> None:
    write_shards(tmp_path)
    expected = load_file(tmp_path / SHARDS[0]) | load_file(tmp_path / SHARDS[1])
    indexed = Checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    unindexed = Checkpoint(tmp_path)
    save_file(expected, tmp_path / "model.safetensors")
    for checkpoint in (indexed, unindexed, Checkpoint(tmp_path)):
        assert set(checkpoint.names) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensor(name, tensor.shape), tensor)
            assert checkpoint.dtype(name) == tensor.dtype
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert checkpoint.num_bytes(name) == tensor.nbytes


def test_a_tensor_is_memory_of_its_own_and_nothing_else_stays_resident(tmp_path: Path) -> None:
    big = torch.randn(16, 2**20)  # 64 MiB
    save_file({f"row.{index}": row.clone() for index, row in enumerate(big)}, tmp_path / "model.safetensors")
    del big
    checkpoint = Checkpoint(tmp_path)
    before = psutil.Process().memory_info().rss
    row = checkpoint.tensor("row.3")
    for index in range(16):
        checkpoint.tensor(f"row.{index}")
    assert psutil.Process().memory_info().rss - before < 20 * 2**20
    row.zero_()
    assert checkpoint.tensor("row.3").abs().sum() > 0


def test_a_missing_shard_is_named_with_the_index_that_wants_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]} is missing, but {INDEX} names it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1, -8])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path: Path, keep: int) -> None:
    write_shards(tmp_path)
    file = tmp_path / SHARDS[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} is truncated: it has \d+ bytes") as error:
        Checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    file = tmp_path / SHARDS[0]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]} ended while it was read"):
        [checkpoint.tensor(name) for name in ("a", "b")]


def test_a_longer_file_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with (tmp_path / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} is damaged"):
        Checkpoint(tmp_path)


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.norm\.weight"):
        checkpoint.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"a has shape \[2, 3\], but config.json makes it \[3, 2\]"):
        checkpoint.tensor("a", (3, 2))


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    for weight_map, sentence in [
        ({"ghost": SHARDS[0]}, f"{SHARDS[0]} has no tensor ghost"),
        ({"a": "../a.safetensors"}, "must lie beside its index"),
        ({"a": 3}, "weight_map must map"),
        (None, "weight_map must map"),
    ]:
        (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=sentence):
            Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
        Checkpoint(tmp_path)


def header(entries: object, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not a checkpoint at all", "is not a safetensors file: its header would have"),
        (struct.pack("<Q", 4) + b"oops", "its header is not JSON"),
        (header([1]), "its header is not a JSON object"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
            "cannot lie in bytes 0 to 4",
        ),
        (
            header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
            "dtype 'X9' is not one of",
        ),
        (header({"a": {"dtype": "F32", "shape": [1]}}) + bytes(4), "header entry of a is damaged"),
        (
            header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
            "header entry of a is damaged",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as error:
        Checkpoint(tmp_path)
    assert "model.safetensors" in str(error.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255), length=st.integers(0, 600))
def test_any_damage_to_a_file_is_an_error_of_the_checkpoint(
    tmp_path: Path, place: int, value: int, length: int
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3, 5).bfloat16()}, file)
    content = bytearray(file.read_bytes())
    content[min(place, len(content) - 1)] = value
    file.write_bytes(content[: max(length, len(content) - length)])
    with contextlib.suppress(CheckpointError):  # damage inside the numbers cannot be seen
        checkpoint = Checkpoint(tmp_path)
        for name in checkpoint.names:
            assert checkpoint.tensor(name).nbytes == checkpoint.num_bytes(name)


def test_a_header_too_deep_for_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        Checkpoint(tmp_path)


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin and no safetensors file, but pickled weights"
    ):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint(tmp_path / "nowhere")
