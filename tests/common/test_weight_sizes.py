"""Sizes that are read from headers are those of the weights in memory, and free memory is what Linux says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.host_memory import free_memory
from common.int8_reference import PackedInt8
from common.kv_cache_size import bytes_per_block, fit_kv_cache
from common.model_config import ModelConfig
from common.weight_sizes import ITEM_BYTES, WeightSizes
from expert_worker.kernels import load_kernels
from expert_worker.shard import Shard, ShardSource
from router.model.latent_cache import LatentCache
from router.model.loading import load_model
from tests.quantized_checkpoint import write_fp8, write_w8a8
from tests.tiny_checkpoint import write_checkpoint


def held_by(model: nn.Module) -> int:
    """Bytes of every tensor of a model, those of int8 layers included."""
    tensors: list[Tensor] = [*model.parameters()]
    values = [value for module in model.modules() for value in vars(module).values()]
    for packed in (value for value in values if isinstance(value, PackedInt8)):
        tensors += [*packed.parts, packed.scale, *([] if packed.bias is None else [packed.bias])]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("kind", ["float", "fp8", "w8a8"])
def test_sizes_from_headers_are_those_in_memory(tmp_path: Path, family: str, kind: str, dtype: str) -> None:
    source, directory = tmp_path / "source", tmp_path / "model"
    write_checkpoint(source, family, vocab_size=512, mtp_layers=int(family == "v3"))
    match kind:
        case "fp8":
            write_fp8(source, directory, (16, 16))
        case "w8a8":
            write_w8a8(source, directory)
        case _:
            directory = source
    model = ModelConfig.from_directory(directory)
    sizes = WeightSizes(directory, model, dtype)
    held = held_by(load_model(directory, dtype, "reference", lambda done, total: None))
    # Of static int8 layers a scale per out-feature is counted that is used up while they are read.
    assert held <= sizes.router_bytes() <= held * (1.02 if kind == "w8a8" else 1)
    shard = Shard(load_kernels("reference"), torch.device("cpu"))
    experts = dict.fromkeys(model.moe_layer_ids, (1, 5, 6))
    shard.hold(ShardSource(directory, dtype), experts, lambda done, total: None)
    assert sizes.shard_bytes(experts) == shard.loaded_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_of_the_cache_has_the_size_that_is_counted(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path, "v3", vocab_size=512)
    model = ModelConfig.from_directory(tmp_path)
    cache = LatentCache(model, 3, 16, getattr(torch, dtype), "cpu")
    held = sum(cache.layer(layer_id).nbytes for layer_id in range(model.num_hidden_layers))
    assert held == 3 * bytes_per_block(model, 16, ITEM_BYTES[dtype])


@pytest.mark.parametrize(
    ("budget", "max_seq_len", "batch", "blocks", "length"),
    [
        # Of 4 layers, 16 tokens and 48 float32, a block has 12288 bytes.
        (12288 * 10, None, 200, 10, 160),
        (12288 * 10, 100, 200, 10, 100),
        (12288 * 10, 100, 1, 7, 100),
        (12288 * 10 - 1, 1000, 200, 9, 144),
        (12287, None, 200, 0, 0),
        (1 << 50, None, 2, 2 * 163840 // 16, 163840),
    ],
)
def test_the_cache_takes_what_fits_and_what_full_batches_can_use(
    tmp_path: Path, budget: int, max_seq_len: int | None, batch: int, blocks: int, length: int
) -> None:
    write_checkpoint(tmp_path, "v3", vocab_size=512)
    model = ModelConfig.from_directory(tmp_path)
    found = fit_kv_cache(model, budget, 16, 4, max_seq_len, batch)
    assert (found.num_blocks, found.max_seq_len, found.bytes_per_block) == (blocks, length, 12288)
    assert found.num_bytes == blocks * 12288


MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\n"


def proc_of(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "meminfo").write_text(MEMINFO)
    return folder


def test_free_memory_is_what_the_machine_has_available(tmp_path: Path) -> None:
    proc = proc_of(tmp_path)
    assert free_memory(proc, tmp_path / "none") == 9000 * 1024
    (proc / "meminfo").write_text(MEMINFO.replace("MemAvailable", "Other"))
    assert free_memory(proc, tmp_path / "none") == 1000 * 1024
    assert free_memory(tmp_path / "none", tmp_path / "none") > 2**20


@pytest.mark.parametrize(
    ("folder", "names", "inactive"),
    [
        (".", ("memory.max", "memory.current"), "inactive_file"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_a_container_has_what_is_left_of_its_limit(
    tmp_path: Path, folder: str, names: tuple[str, str], inactive: str
) -> None:
    proc = proc_of(tmp_path)
    group = tmp_path / "group" / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text("5000000")
    (group / names[1]).write_text("4000000")
    (group / "memory.stat").write_text(f"anon 7\n{inactive} 500000\n")
    assert free_memory(proc, tmp_path / "group") == 1_500_000
    (group / names[0]).write_text("max" if folder == "." else str(2**63 - 4096))
    assert free_memory(proc, tmp_path / "group") == 9000 * 1024
    (group / names[0]).write_text("3000000")
    assert free_memory(proc, tmp_path / "group") == 0
