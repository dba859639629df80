"""The speed of a whole expertmesh fleet, as a client sees it: `expertmesh up`, measured through gRPC."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.serving.workload import Speeds, Workload, prompt
from protos import generation_pb2, generation_pb2_grpc
from tests.e2e.fleet import fleet_of

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When the tokens of one answer arrived, in seconds: (time, number of tokens) of each message."""

    messages: list[tuple[float, int]]
    timings: generation_pb2.Timings

    @property
    def first(self) -> float:
        return self.messages[0][0]

    @property
    def last(self) -> float:
        return self.messages[-1][0]


def fleet_speeds(model: Path, expert_workers: int, ep_level: int, workload: Workload) -> Speeds:
    """Start a fleet on `model`, do the work, and end it.

    Args:
        expert_workers: 0 keeps the experts in the router's engine.
    """
    flags = ("--expert-workers", str(expert_workers), "--ep-level", str(ep_level))
    with fleet_of(model, *flags, OMP_NUM_THREADS=str(workload.threads)) as fleet:
        return serve(fleet.grpc_address, workload)


def serve(grpc_address: str, workload: Workload) -> Speeds:
    """Have the router at an address do the work, after a prompt that does not count."""
    speeds = workload.no_speeds()
    with grpc.insecure_channel(grpc_address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        answer(stub, prompt(workload.prefill_tokens, 99), 4)
        for repetition in range(workload.repetitions):
            timings = answer(stub, workload.long_prompt(repetition), 1).timings
            speeds[workload.prefill_name()].append(
                workload.prefill_tokens / (timings.first_token_s - timings.queue_s)
            )
            for batch in workload.batches:
                speeds[workload.decode_name(batch)].append(decode_speed(stub, batch, workload))
    return speeds


def decode_speed(stub: generation_pb2_grpc.GenerationServiceStub, batch: int, workload: Workload) -> float:
    """Tokens/s that arrive while all answers of the batch are running.

    That is between the last of the first tokens and the first of the last ones.
    """
    with ThreadPoolExecutor(batch) as pool:
        answers = list(
            pool.map(lambda short: answer(stub, short, workload.decode_tokens), workload.short_prompts(batch))
        )
    began, ended = max(one.first for one in answers), min(one.last for one in answers)
    arrived = sum(count for one in answers for when, count in one.messages if began < when <= ended)
    return arrived / (ended - began)


def answer(
    stub: generation_pb2_grpc.GenerationServiceStub, token_ids: list[int], num_tokens: int
) -> Arrivals:
    """Have `num_tokens` generated greedily, and note when they arrive."""
    sampling = generation_pb2.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    request = generation_pb2.GenerateRequest(sampling=sampling)
    request.token_ids.ids.extend(token_ids)
    messages = []
    timings = generation_pb2.Timings()
    for response in stub.Generate(request, timeout=TIMEOUT_S):
        match response.WhichOneof("event"):
            case "chunk" if response.chunk.token_ids:
                messages.append((time.monotonic(), len(response.chunk.token_ids)))
            case "finished":
                timings = response.finished.timings
    return Arrivals(messages, timings)
