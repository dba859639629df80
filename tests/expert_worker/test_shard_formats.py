"""Experts in every format: the same bits however they are spread, and close to what the weights stand for."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common import process_group
from common.errors import CheckpointError
from common.exchange import Received, RouterExchange, StepHeader
from common.exchange.loopback import Compute, LoopbackExchange
from common.exchange.routing import RowShape
from common.model_config import ModelConfig
from common.placement import contiguous
from common.quantization.row_format import int8_layers
from expert_worker import step_loop
from expert_worker.experts import LayerExperts
from expert_worker.kernels import load_kernels
from expert_worker.shard import Shard, ShardSource
from tests.distributed import fleet_of_threads as fleet
from tests.kernels.comparing import THREAD_COUNTS, num_threads
from tests.quantized_checkpoint import read_tensors, write_float, write_fp8, write_w8a8
from tests.tiny_checkpoint import write_checkpoint

HIDDEN_SIZE, INTERMEDIATE, NUM_EXPERTS, TOP_K, LAYER = 160, 136, 16, 4, 1
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
FORMATS = pytest.mark.parametrize("name", ["bf16", "fp8", "w8a8"])
ALL = {LAYER: tuple(range(NUM_EXPERTS))}

Forms = set[tuple[torch.dtype, bool]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root / "bf16", "v3", **SIZES)
    write_fp8(root / "bf16", root / "fp8")
    write_w8a8(root / "bf16", root / "w8a8")
    return root


def hold(directory: Path, experts: dict[int, tuple[int, ...]], dtype: str = "bfloat16") -> LayerExperts:
    shard = Shard(load_kernels("cpu"), torch.device("cpu"))
    return shard.hold(ShardSource(directory, dtype), experts, lambda *_: None)[LAYER]


def shape_of(directory: Path) -> RowShape:
    takes_int8 = int8_layers(directory, ModelConfig.from_directory(directory))
    return RowShape(HIDDEN_SIZE, TOP_K, torch.bfloat16, takes_int8)


def routed(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    rows = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).bfloat16()
    weights, ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K, dim=1)
    return rows, ids, weights


@contextmanager
def workers(directory: Path, num_workers: int) -> Iterator[tuple[RouterExchange, Forms]]:
    """Expert workers in threads, each with its own shard, at the other end of real links.

    Beside the router's end, what rows they were given: a dtype, and whether scales came with it.
    """
    placement, shape = contiguous(NUM_EXPERTS, num_workers, [LAYER]), shape_of(directory)
    store = process_group.open_store("127.0.0.1")
    is_stopped = threading.Event()
    ends = []
    forms: Forms = set()

    def serve(rank: int) -> None:
        layer = hold(directory, placement.experts_of(rank))
        exchange, _ = fleet.join_routers([store], rank, placement, shape, 0.0, "links", lambda *_: None)
        ends.append(exchange)

        def outputs(got: Received) -> Tensor:
            forms.add((got.rows.dtype, got.row_scales is not None))
            return layer.forward(got.rows, got.tokens_per_expert, row_scales=got.row_scales)

        step_loop.serve(exchange, outputs, is_stopped.is_set)

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    router = fleet.join_workers(store, placement, shape)
    try:
        yield router, forms
    finally:
        is_stopped.set()
        router.close()
        for end in ends:
            end.close()
        for thread in threads:
            thread.join(5)


def step(exchange: RouterExchange, step_id: int, level: int, num_tokens: int) -> Tensor:
    exchange.begin(StepHeader(fleet.TERM, fleet.EPOCH, step_id, level, num_tokens))
    return exchange.combine(exchange.dispatch(LAYER, 0, *routed(num_tokens)))


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@FORMATS
def test_workers_give_the_bits_of_one_process_in_every_format(
    root: Path, name: str, num_workers: int
) -> None:
    layer = hold(root / name, ALL)
    takes_int8 = shape_of(root / name).int8_layers
    assert takes_int8 == ({LAYER} if name == "w8a8" else set())
    # One gets rows as they are and quantises them for itself, the other gets them quantised.
    plain, quantised = (
        LoopbackExchange(compute_of(layer), ALL, layers) for layers in (frozenset[int](), takes_int8)
    )
    with workers(root / name, num_workers) as (router, forms):
        for step_id, (level, count) in enumerate(itertools.product((1, 2), (1, 5, 64))):
            expected = step(plain, step_id, level, count)
            assert torch.equal(step(router, step_id, level, count), expected)
            assert torch.equal(step(quantised, step_id, level, count), expected)
    assert forms == {(torch.bfloat16, False)} | ({(torch.int8, True)} if takes_int8 else set())


def compute_of(layer: LayerExperts) -> Compute:
    return lambda _, rows, scales, counts, grouped: layer.forward(
        rows, counts, row_scales=scales, is_grouped=grouped
    )


@pytest.mark.distributed
def test_workers_of_which_some_hold_floats_in_a_layer_and_some_int8_all_take_floats(
    root: Path, tmp_path: Path
) -> None:
    mixed = write_mixed(root, tmp_path, experts=range(NUM_EXPERTS // 2))
    halves = contiguous(NUM_EXPERTS, 2, [LAYER])
    kept = [hold(mixed, halves.experts_of(rank)) for rank in range(2)]

    def compute(_: int, rows: Tensor, scales: Tensor | None, counts: Tensor, grouped: bool) -> Tensor:
        parts = rows.split([int(half.sum()) for half in counts.chunk(2)])
        return torch.cat(
            [one.forward(part, half) for one, part, half in zip(kept, parts, counts.chunk(2), strict=True)]
        )

    loopback = LoopbackExchange(compute, ALL)
    with workers(mixed, 2) as (router, forms):
        for step_id, level in enumerate((1, 2)):
            assert torch.equal(step(router, step_id, level, 33), step(loopback, step_id, level, 33))
    assert forms == {(torch.bfloat16, False)}


@FORMATS
def test_rows_in_any_batch_and_with_any_number_of_threads_have_the_same_bits(root: Path, name: str) -> None:
    layer = hold(root / name, ALL)
    rows, counts = torch.randn(80, HIDDEN_SIZE).bfloat16(), torch.full((NUM_EXPERTS,), 5)
    with num_threads(1):
        alone = torch.cat(
            [
                layer.forward(row.unsqueeze(0), torch.eye(NUM_EXPERTS, dtype=torch.int64)[i // 5])
                for i, row in enumerate(rows)
            ]
        )
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            assert torch.equal(layer.forward(rows, counts), alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_experts_have_the_bits_of_their_dequantised_weights(
    root: Path, tmp_path: Path, dtype: str
) -> None:
    write_float(root / "fp8", tmp_path / "float")
    rows, counts = torch.randn(32, HIDDEN_SIZE).to(getattr(torch, dtype)), torch.full((NUM_EXPERTS,), 2)
    found, expected = (
        hold(directory, ALL, dtype).forward(rows, counts) for directory in (root / "fp8", tmp_path / "float")
    )
    assert torch.equal(found, expected)


def test_w8a8_experts_are_as_far_from_their_dequantised_weights_as_rounding_rows_makes_them(
    root: Path, tmp_path: Path
) -> None:
    write_float(root / "w8a8", tmp_path / "float")
    rows, counts = torch.randn(320, HIDDEN_SIZE), torch.full((NUM_EXPERTS,), 20)
    found, expected = (
        hold(directory, ALL, "float32").forward(rows, counts)
        for directory in (root / "w8a8", tmp_path / "float")
    )
    # Rows of this width have 40 steps to a standard deviation, so each product is off by 0.7 % of its size.
    assert 0.005 < float((found - expected).norm() / expected.norm()) < 0.02


def test_int8_experts_are_held_in_int8(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "vocab_size": 128, "num_hidden_layers": 2}
    write_checkpoint(tmp_path / "bf16", "v3", **sizes)  # type: ignore[arg-type]
    write_w8a8(tmp_path / "bf16", tmp_path / "w8a8")
    hold(tmp_path / "w8a8", {LAYER: (0,)})  # oneDNN itself takes some megabytes
    shard = Shard(load_kernels("cpu"), torch.device("cpu"))
    before = psutil.Process().memory_info().rss
    layers = shard.hold(ShardSource(tmp_path / "w8a8", "bfloat16"), ALL, lambda *_: None)
    grown = psutil.Process().memory_info().rss - before
    assert shard.loaded_bytes == NUM_EXPERTS * (3 * 1024 * 512 + 4 * (512 + 512 + 1024))
    assert layers[LAYER].num_local_experts == NUM_EXPERTS
    assert grown < 1.4 * shard.loaded_bytes


def describe(directory: Path, changes: dict[str, str]) -> None:
    file = directory / "quant_model_description.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_mixed(root: Path, target: Path, experts: Iterable[int]) -> Path:
    """Write W8A8 but for these experts, which stay in bfloat16."""
    paths = tuple(f"model.layers.{LAYER}.mlp.experts.{expert}." for expert in experts)
    floats = {name: one for name, one in read_tensors(root / "bf16").items() if name.startswith(paths)}
    write_w8a8(root / "bf16", target / "w8a8", mindie_format=True)
    (file,) = (target / "w8a8").glob("*.safetensors")
    save_file(read_tensors(target / "w8a8") | floats, file)
    (description,) = (target / "w8a8").glob("quant_model_description*.json")
    types = json.loads(description.read_text()) | dict.fromkeys(floats, "FLOAT")
    description.write_text(json.dumps(types))
    return target / "w8a8"


def test_a_layer_whose_experts_differ_in_type_is_refused(root: Path, tmp_path: Path) -> None:
    mixed = write_mixed(root, tmp_path, experts=[3])
    hold(mixed, {LAYER: (3,)})
    with pytest.raises(
        CheckpointError, match="layer 1 has 1 experts in floating point and 15 in int8 on this"
    ):
        hold(mixed, ALL)


def test_experts_of_mixed_or_static_types_are_refused(root: Path, tmp_path: Path) -> None:
    write_w8a8(root / "bf16", tmp_path / "w8a8")
    expert = f"model.layers.{LAYER}.mlp.experts.3"
    describe(tmp_path / "w8a8", {f"{expert}.up_proj.weight": "FLOAT"})
    with pytest.raises(
        CheckpointError, match=rf"{expert} are W8A8_DYNAMIC, FLOAT, W8A8_DYNAMIC, but those of"
    ):
        hold(tmp_path / "w8a8", ALL)
    parts = ("gate_proj", "up_proj", "down_proj")
    describe(tmp_path / "w8a8", {f"{expert}.{part}.weight": "W8A8" for part in parts})
    with pytest.raises(CheckpointError, match=rf"{expert} are W8A8, W8A8, W8A8, but those of an expert must"):
        hold(tmp_path / "w8a8", ALL)
