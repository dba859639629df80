"""Drives vLLM for CPUs: `PYTHON -m benchmarks.serving.vllm_engine MODEL_DIR WORKLOAD`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.serving.python_engine import drive
from benchmarks.serving.workload import Speeds, Workload, prompt

CACHE_GIB = "1"


def vllm_speeds(model: Path, workload: Workload) -> Speeds:
    """Load the model in bfloat16 and do the work, without a tokenizer and without a server."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{workload.threads - 1}")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(model),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=2 * workload.prefill_tokens,
        max_num_batched_tokens=2048,
        max_num_seqs=max(workload.batches),
        enable_prefix_caching=False,
        disable_log_stats=False,  # without statistics an answer has no times
    )

    def answers(prompts: list[list[int]], num_tokens: int) -> list[object]:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": token_ids} for token_ids in prompts]
        done: list[object] = engine.generate(requests, sampling, use_tqdm=False)
        return done

    def times(done: list[object], name: str) -> list[float]:
        return [getattr(one.metrics, name) for one in done]  # type: ignore[attr-defined]

    speeds = workload.no_speeds()
    answers([prompt(workload.prefill_tokens, 99)], 4)
    for repetition in range(workload.repetitions):
        began = time.perf_counter()
        answers([workload.long_prompt(repetition)], 1)
        speeds[workload.prefill_name()].append(workload.prefill_tokens / (time.perf_counter() - began))
        for batch in workload.batches:
            done = answers(workload.short_prompts(batch), workload.decode_tokens)
            duration_s = max(times(done, "last_token_ts")) - max(times(done, "first_token_ts"))
            speeds[workload.decode_name(batch)].append(batch * (workload.decode_tokens - 1) / duration_s)
    return speeds


if __name__ == "__main__":
    drive(vllm_speeds)
