"""Prefill and decode speed, and peak memory, of a whole fleet on one machine, measured through gRPC.

`python -m benchmarks.bench_serving MODEL_DIR [--expert-workers 2] [--ep-level 1] [--json FILE]`
Every figure is the median of the repetitions; the fleet is `expertmesh up`, the client is in another process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests.e2e.fleet import Fleet, fleet_of, generate

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
BATCHES = (1, 8, 32)
REPETITIONS = 3
IMPORTS_ONLY = "import {module}, psutil; print(psutil.Process().memory_info().rss)"


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Token ids that differ from prompt to prompt."""
    return [(seed * 7919 + position * 104729) % 90000 + 100 for position in range(num_tokens)]


def prefill_tokens_per_s(fleet: Fleet) -> float:
    """Tokens of one long prompt over the time to its first token."""
    times = []
    for repetition in range(REPETITIONS):
        answer = generate(
            fleet,
            prompt_of(PREFILL_TOKENS, repetition),
            timeout=600,
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
        )
        times.append(answer.finished.timings.first_token_s - answer.finished.timings.queue_s)
    return PREFILL_TOKENS / statistics.median(times)


def decode_tokens_per_s(fleet: Fleet, batch: int) -> float:
    """Tokens of `batch` simultaneous answers over the time from the first token to the last."""

    def one(index: int) -> tuple[float, float, int]:
        started = time.monotonic()
        answer = generate(
            fleet,
            prompt_of(16, index),
            timeout=600,
            temperature=0.0,
            max_tokens=DECODE_TOKENS,
            ignore_eos=True,
        )
        timings = answer.finished.timings
        return (
            started + timings.first_token_s,
            started + timings.total_s,
            answer.finished.usage.completion_tokens,
        )

    speeds = []
    for _ in range(REPETITIONS):
        with ThreadPoolExecutor(batch) as pool:
            spans = list(pool.map(one, range(batch)))
        duration_s = max(end for _, end, _ in spans) - max(first for first, _, _ in spans)
        speeds.append(batch * (DECODE_TOKENS - 1) / duration_s)
    return statistics.median(speeds)


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
    parser.add_argument("--ep-level", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags = ("--expert-workers", str(options.expert_workers), "--ep-level", str(options.ep_level))
    with fleet_of(options.model, *flags, OMP_NUM_THREADS=str(psutil.cpu_count())) as fleet:
        generate(
            fleet, prompt_of(64, 99), timeout=600, temperature=0.0, max_tokens=4, ignore_eos=True
        )  # warm up
        result: dict[str, object] = {
            "expert_workers": options.expert_workers,
            "ep_level": options.ep_level,
            f"prefill {PREFILL_TOKENS}": prefill_tokens_per_s(fleet),
        }
        result |= {f"decode batch {batch}": decode_tokens_per_s(fleet, batch) for batch in BATCHES}
        result["memory"] = memory(fleet)
    print("| figure | value |\n|---|---|")
    for name, value in result.items():
        if isinstance(value, dict):
            for process, row in value.items():
                print(
                    f"| {process} | " + ", ".join(f"{key} {mib:.0f} MiB" for key, mib in row.items()) + " |"
                )
        else:
            print(f"| {name} | {value:.1f} |" if isinstance(value, float) else f"| {name} | {value} |")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
