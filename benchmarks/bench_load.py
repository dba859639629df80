"""How long weights take to load, beside a plain read of as many bytes and the first use of as much memory.

`python -m benchmarks.bench_load MODEL_DIR [--expert-workers 2] [--rounds 3]`

Each load has a process of its own; the two others are timed just before it there. The files are read once
before, so that they come from memory and it is our work that is measured, not the disk. New memory, in the
large pages that weights lie in, is the system's work, and may take longer than all the rest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.checkpoint import Checkpoint
from common.device import open_device
from common.huge_pages import HugePageArena
from common.model_config import ModelConfig
from common.tensor_names import is_elsewhere
from expert_worker.kernels import load_kernels
from expert_worker.shard import Shard, ShardSource
from router.model.loading import load_model

PIECE_BYTES = 1 << 24


def load_router(model: Path) -> None:
    """Load everything but the routed experts."""
    load_model(model, "auto", "cpu", lambda loaded, total: None)


def load_worker(model: Path, expert_workers: int) -> None:
    """Load the experts of one worker."""
    config = ModelConfig.from_directory(model)
    own = tuple(range(0, config.n_routed_experts, expert_workers))
    experts = dict.fromkeys(config.moe_layer_ids, own)
    source = ShardSource(model, config.dtype_name)
    Shard(load_kernels("cpu"), open_device("cpu")).hold(source, experts, lambda loaded, total: None)


def stored_bytes(model: Path) -> tuple[int, int]:
    """The bytes that the checkpoint has for the router, and for all routed experts."""
    config, checkpoint = ModelConfig.from_directory(model), Checkpoint(model)
    sizes = [0, 0]
    for name in checkpoint.names:
        sizes[is_elsewhere(name, config)] += checkpoint.num_bytes(name)
    return sizes[0], sizes[1]


def read_plainly(model: Path, num_bytes: int) -> None:
    """Read as many bytes of the checkpoint, piece by piece into the same memory."""
    piece = memoryview(bytearray(PIECE_BYTES))
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while num_bytes and (count := file.readinto(piece[:num_bytes])):
                num_bytes -= count


def use_memory(num_bytes: int) -> None:
    """Have the system give as much memory as weights of this size take, and write to all of it."""
    HugePageArena(num_bytes).take(num_bytes).fill_(1)


def seconds(work: Callable[[], None]) -> float:
    """How long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(model: Path, load: Callable[[], None], num_bytes: int) -> tuple[float, float, float]:
    """Seconds of a plain read, of the first use of memory, and of a load, in this process."""
    plain = partial(read_plainly, model, num_bytes), partial(use_memory, num_bytes)
    return seconds(plain[0]), seconds(plain[1]), seconds(load)


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--expert-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    router_bytes, expert_bytes = stored_bytes(options.model)
    read_plainly(options.model, router_bytes + expert_bytes)
    print("| who | MB | load s | plain read s | new memory s | load / both |\n" + "|---" * 6 + "|")
    for who, load, num_bytes in (
        ("router", partial(load_router, options.model), router_bytes),
        (
            f"one of {options.expert_workers} workers",
            partial(load_worker, options.model, options.expert_workers),
            expert_bytes // options.expert_workers,
        ),
    ):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rounds = [pool.apply(measure, (options.model, load, num_bytes)) for _ in range(options.rounds)]
        read_s, memory_s, load_s = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(load / (read + memory) for read, memory, load in rounds)
        figures = (f"{value:.2f}" for value in (load_s, read_s, memory_s, ratio))
        print(f"| {who} | {num_bytes / 1e6:.0f} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
