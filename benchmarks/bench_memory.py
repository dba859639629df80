"""Peak memory of a fleet's processes: while they load, and while they do the work of the serving benchmark.

`python -m benchmarks.bench_memory MODEL_DIR [--expert-workers 2] [--ep-level 2]`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import psutil

from benchmarks.serving.fleet_speed import serve
from benchmarks.serving.workload import Workload
from common.model_config import ModelConfig
from router.model.loading import DTYPES
from tests.e2e.fleet import Fleet, fleet_of

MIB = float(1 << 20)

IMPORTS_ONLY = "import {module}, psutil; print(psutil.Process().memory_info().rss)"


def peak_rss(process: psutil.Process) -> int:
    """Most resident memory the process ever had, in bytes (Linux)."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not report VmHWM")


def forget_peak(process: psutil.Process) -> None:
    """Let the process's peak begin again at what it holds now (Linux, proc(5): clear_refs)."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def imports_only_rss(module: str) -> int:
    """Resident memory of a process that has only imported `module`, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_ONLY.format(module=module)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def computing(fleet: Fleet) -> dict[str, psutil.Process]:
    """The processes that hold weights."""
    executors = {f"executor {rank}": executor for rank, executor in enumerate(fleet.executors())}
    return {"router engine": fleet.engine(), **executors}


def must_hold(fleet: Fleet, cache: int) -> dict[str, tuple[int, int, int]]:
    """What each of them has to hold, in bytes: weights, what is used of the KV cache, and its imports."""
    status = fleet.status()
    executor = imports_only_rss("expert_worker.executor")
    engine = (status.engine_loaded_bytes, cache, imports_only_rss("router.engine_process"))
    workers = {f"executor {one.ep_rank}": (one.loaded_bytes, 0, executor) for one in status.workers}
    return {"router engine": engine, **workers}


def cache_bytes(model: Path) -> int:
    """What the serving benchmark fills of the KV cache: its largest batch, or its long prompt."""
    config, work = ModelConfig.from_directory(model), Workload()
    tokens = max(work.prefill_tokens, max(work.batches) * (work.prompt_tokens + work.decode_tokens))
    row = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    return tokens * row * DTYPES[config.dtype_name].itemsize


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--expert-workers", type=int, default=2)
    parser.add_argument("--ep-level", type=int, choices=(1, 2), default=2)
    options = parser.parse_args()
    flags = ("--expert-workers", str(options.expert_workers), "--ep-level", str(options.ep_level))
    with fleet_of(options.model, *flags, OMP_NUM_THREADS=str(psutil.cpu_count())) as fleet:
        processes = computing(fleet)
        loading = {name: peak_rss(process) for name, process in processes.items()}
        for process in processes.values():
            forget_peak(process)
        serve(fleet.grpc_address, Workload(repetitions=1))
        serving = {name: peak_rss(process) for name, process in processes.items()}
        needed = must_hold(fleet, cache_bytes(options.model))
    print(
        "| process | weights MiB | cache | imports only | sum | peak serving | peak loading |\n"
        + "|---" * 7
        + "|"
    )
    for name, parts in needed.items():
        whole = sum(parts)
        peaks = (f"{peak[name] / MIB:.0f} ({peak[name] / whole:.2f})" for peak in (serving, loading))
        columns = [name, *(f"{part / MIB:.0f}" for part in (*parts, whole)), *peaks]
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
