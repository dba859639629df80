"""Peak memory of every process of a fleet that has done the work of the serving benchmark.

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
from tests.e2e.fleet import Fleet, fleet_of

IMPORTS_ONLY = "import {module}, psutil; print(psutil.Process().memory_info().rss)"


def peak_rss(process: psutil.Process) -> int:
    """Most resident memory the process ever had, in bytes (Linux)."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not report VmHWM")


def imports_only_rss(module: str) -> int:
    """Resident memory of a process that has only imported `module`, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_ONLY.format(module=module)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def memory(fleet: Fleet) -> dict[str, dict[str, float]]:
    """Peak memory of engine and executors beside what they must hold, in MiB."""
    status = fleet.status()
    mib = float(1 << 20)
    rows = {}
    floor = imports_only_rss("router.engine_process")
    rows["router engine"] = {
        "peak": peak_rss(fleet.engine()) / mib,
        "weights": status.engine_loaded_bytes / mib,
        "imports": floor / mib,
    }
    floor = imports_only_rss("expert_worker.executor")
    for worker, executor in zip(status.workers, fleet.executors(), strict=True):
        rows[f"executor {worker.ep_rank}"] = {
            "peak": peak_rss(executor) / mib,
            "weights": worker.loaded_bytes / mib,
            "imports": floor / mib,
        }
    return rows


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--expert-workers", type=int, default=2)
    parser.add_argument("--ep-level", type=int, choices=(1, 2), default=2)
    options = parser.parse_args()
    flags = ("--expert-workers", str(options.expert_workers), "--ep-level", str(options.ep_level))
    with fleet_of(options.model, *flags, OMP_NUM_THREADS=str(psutil.cpu_count())) as fleet:
        serve(fleet.grpc_address, Workload(repetitions=1))
        rows = memory(fleet)
    print(
        "| process | peak MiB | weights | imports only | peak over weights + imports |\n" + "|---" * 5 + "|"
    )
    for process, row in rows.items():
        over = row["peak"] / (row["weights"] + row["imports"])
        print(f"| {process} | {row['peak']:.0f} | {row['weights']:.0f} | {row['imports']:.0f} | {over:.2f} |")


if __name__ == "__main__":
    main()
