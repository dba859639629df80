"""A shard holds what it was asked to hold, reads nothing twice, and computes what the checkpoint says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from common.errors import CheckpointError
from expert_worker.kernels import load_kernels
from expert_worker.shard import Shard, ShardSource
from tests.tiny_checkpoint import write_checkpoint

HIDDEN_SIZE, INTERMEDIATE, NUM_EXPERTS = 64, 32, 16
BYTES_PER_EXPERT = 3 * HIDDEN_SIZE * INTERMEDIATE * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family="v3", vocab_size=256, torch_dtype="float32")
    return directory


def shard() -> Shard:
    return Shard(load_kernels("cpu"), torch.device("cpu"))


def source(checkpoint: Path, dtype: str = "float32") -> ShardSource:
    return ShardSource(checkpoint, dtype)


def naive(checkpoint: Path, layer_id: int, expert: int, rows: Tensor) -> Tensor:
    weights: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        weights |= load_file(file)
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert}"
    gate = rows @ weights[f"{prefix}.gate_proj.weight"].T
    up = rows @ weights[f"{prefix}.up_proj.weight"].T
    return (F.silu(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T


def test_rows_go_through_the_experts_that_were_asked_for_in_local_order(checkpoint: Path) -> None:
    layers = shard().hold(source(checkpoint), {1: (5, 2), 3: (0,)}, lambda *_: None)
    rows = torch.randn(5, HIDDEN_SIZE)
    found = layers[1].forward(rows, torch.tensor([2, 3]))
    expected = torch.cat([naive(checkpoint, 1, 5, rows[:2]), naive(checkpoint, 1, 2, rows[2:])])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert layers[3].expert_ids == (0,)


def test_only_what_is_missing_is_read_and_only_what_is_wanted_stays(checkpoint: Path) -> None:
    held = shard()
    told: list[tuple[int, int]] = []
    first = held.hold(source(checkpoint), {1: (0, 1)}, lambda *amounts: told.append(amounts))
    assert told == [(0, 2 * BYTES_PER_EXPERT)] + [
        (n * BYTES_PER_EXPERT, 2 * BYTES_PER_EXPERT) for n in (1, 2)
    ]
    told.clear()
    second = held.hold(source(checkpoint), {1: (1, 2)}, lambda *amounts: told.append(amounts))
    assert [loaded for loaded, _ in told] == [BYTES_PER_EXPERT, 2 * BYTES_PER_EXPERT]
    assert held.loaded_bytes == 2 * BYTES_PER_EXPERT
    rows = torch.randn(2, HIDDEN_SIZE)
    counts = torch.tensor([1, 1])
    # Expert 1 is the second of the first epoch and the first of the second; the first epoch still computes.
    old, new = first[1].forward(rows, counts), second[1].forward(rows.flip(0), counts)
    assert torch.equal(old[1], new[0])


def test_the_same_experts_again_are_the_same_objects_and_no_file_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v3", vocab_size=256, torch_dtype="float32")
    held = shard()
    wanted = {1: (3, 1), 2: (0,)}
    assert not held.holds(source(tmp_path), wanted)
    first = dict(held.hold(source(tmp_path), wanted, lambda *_: None))
    assert held.holds(source(tmp_path), wanted)
    for file in tmp_path.iterdir():
        file.unlink()
    told: list[tuple[int, int]] = []
    second = held.hold(source(tmp_path), wanted, lambda *amounts: told.append(amounts))
    assert told == [(3 * BYTES_PER_EXPERT, 3 * BYTES_PER_EXPERT)]
    assert all(second[layer_id] is first[layer_id] for layer_id in wanted)
    for other in ({1: (1, 3), 2: (0,)}, {1: (3, 1)}):
        assert not held.holds(source(tmp_path), other)
    assert not held.holds(source(tmp_path, "bfloat16"), wanted)


def test_a_loading_that_is_interrupted_keeps_what_it_has_read(checkpoint: Path) -> None:
    class Enough(Exception):
        pass

    def stop(loaded: int, total: int) -> None:
        if loaded == 3 * BYTES_PER_EXPERT:
            raise Enough

    held = shard()
    wanted = {1: tuple(range(8))}
    with pytest.raises(Enough):
        held.hold(source(checkpoint), wanted, stop)
    told: list[int] = []
    held.hold(source(checkpoint), wanted, lambda loaded, total: told.append(loaded))
    assert told[0] == 3 * BYTES_PER_EXPERT
    assert told[-1] == 8 * BYTES_PER_EXPERT


def test_another_checkpoint_or_dtype_replaces_everything(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v3", vocab_size=256, torch_dtype="float32", seed=1)
    held = shard()
    rows = torch.randn(1, HIDDEN_SIZE)
    here = held.hold(source(checkpoint), {1: (0,)}, lambda *_: None)[1].forward(rows, torch.tensor([1]))
    there = held.hold(source(tmp_path), {1: (0,)}, lambda *_: None)[1].forward(rows, torch.tensor([1]))
    assert not torch.equal(here, there)
    held.hold(source(tmp_path, "bfloat16"), {1: (0,)}, lambda *_: None)
    assert held.loaded_bytes == BYTES_PER_EXPERT // 2


@pytest.mark.parametrize("experts", [{1: (NUM_EXPERTS,)}, {0: (0,)}, {9: (0,)}])
def test_experts_the_checkpoint_does_not_have_are_refused(
    checkpoint: Path, experts: dict[int, tuple[int, ...]]
) -> None:
    with pytest.raises(CheckpointError, match="same checkpoint"):
        shard().hold(source(checkpoint), experts, lambda *_: None)


def test_a_worker_holds_its_share_and_nothing_of_the_rest(tmp_path: Path) -> None:
    size: dict[str, Any] = {
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "vocab_size": 256,
    }
    write_checkpoint(tmp_path, family="v3", torch_dtype="float32", num_shards=1, **size)
    share = 3 * 512 * 256 * 4 * 4  # 4 of 16 experts, 6 MiB
    before = psutil.Process().memory_info().rss
    held = shard()
    layers = held.hold(source(tmp_path), {1: (0, 1, 2, 3)}, lambda *_: None)
    grown = psutil.Process().memory_info().rss - before
    assert held.loaded_bytes == share
    assert layers[1].num_local_experts == 4
    assert grown < 2 * share
