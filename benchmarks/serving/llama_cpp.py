"""The speed of llama.cpp, as its own llama-bench and llama-batched-bench measure it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.serving.workload import Speeds, Workload

TIMEOUT_S = 900.0
PROGRAMS = ("llama-bench", "llama-batched-bench")


def llama_cpp_speeds(binaries: Path, gguf: Path, workload: Workload) -> Speeds:
    """Run both programs, which are in the folder `binaries`, on one GGUF file.

    The tokens that they decode are random ones: they sample nothing.
    """
    speeds = workload.no_speeds()
    threads = ("-t", str(workload.threads))
    prefill = _run(
        *(str(binaries / "llama-bench"), "-m", str(gguf), *threads, "-o", "json"),
        *("-p", str(workload.prefill_tokens), "-n", "0", "-r", str(workload.repetitions)),
    )
    speeds[workload.prefill_name()] = json.loads(prefill)[0]["samples_ts"]
    cache = max(workload.batches) * (workload.prompt_tokens + workload.decode_tokens)
    batches = ",".join(map(str, workload.batches * workload.repetitions))
    decode = _run(
        *(str(binaries / "llama-batched-bench"), "-m", str(gguf), *threads, "-tb", threads[1]),
        *("-c", str(cache), "-npp", str(workload.prompt_tokens), "-ntg", str(workload.decode_tokens)),
        *("-npl", batches, "--output-format", "jsonl"),
    )
    for line in decode.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            speeds[workload.decode_name(row["pl"])].append(row["speed_tg"])
    return speeds


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
