"""Drives transformers: `python -m benchmarks.serving.transformers_engine MODEL_DIR WORKLOAD`."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.serving.python_engine import drive
from benchmarks.serving.workload import Speeds, Workload, prompt


@torch.inference_mode()
def transformers_speeds(model_directory: Path, workload: Workload) -> Speeds:
    """Load the model in bfloat16 and do the work in a bare loop, which is faster than `generate`."""
    torch.set_num_threads(workload.threads)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)

    def step(token_ids: Tensor, cache: DynamicCache) -> Tensor:  # [B, tokens] -> [B, 1]
        output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        next_ids: Tensor = output.logits[:, -1:].argmax(-1)
        return next_ids

    speeds = workload.no_speeds()
    step(torch.tensor([prompt(workload.prefill_tokens, 99)]), DynamicCache())
    for repetition in range(workload.repetitions):
        began = time.perf_counter()
        step(torch.tensor([workload.long_prompt(repetition)]), DynamicCache())
        speeds[workload.prefill_name()].append(workload.prefill_tokens / (time.perf_counter() - began))
        for batch in workload.batches:
            cache = DynamicCache()
            next_ids = step(torch.tensor(workload.short_prompts(batch)), cache)
            began = time.perf_counter()
            for _ in range(workload.decode_tokens - 1):
                next_ids = step(next_ids, cache)
            duration_s = time.perf_counter() - began
            speeds[workload.decode_name(batch)].append(batch * (workload.decode_tokens - 1) / duration_s)
    return speeds


if __name__ == "__main__":
    drive(transformers_speeds)
