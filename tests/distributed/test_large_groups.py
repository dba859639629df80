"""40 and 64 expert workers on one machine: real agents, executors and links, both levels in one start."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from common.grpc_server import CHANNEL_OPTIONS
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from router.messages import CommitTune
from tests.distributed.fleet_in_process import fleet
from tests.distributed.forked_executor import PATH_VARIABLE
from tests.e2e.fleet import fleet_of, generate
from tests.router.engine_child import tune
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.asyncio, pytest.mark.distributed, pytest.mark.slow]

FORKED = "tests.distributed.forked_executor"
SHAPE: dict[str, Any] = {
    "n_routed_experts": 320,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 16,
    "n_group": 8,
    "topk_group": 4,
}
MOST_BYTES = 12 << 30
NUM_TOKENS = 12
PROMPTS = ("Forty workers share", "x", "The answer does not depend on " * 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, family="v3", **SHAPE)
    return directory


@asynccontextmanager
async def forkserver(folder: Path) -> AsyncIterator[psutil.Process]:
    path = folder / "fork"
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.distributed.executor_forkserver",
        str(path),
        stdout=asyncio.subprocess.PIPE,
    )
    os.environ[PATH_VARIABLE] = str(path)
    try:
        assert server.stdout is not None
        assert await server.stdout.readline() == b"listening\n"
        yield psutil.Process(server.pid)
    finally:
        del os.environ[PATH_VARIABLE]
        server.kill()
        await server.wait()


async def greedy(address: str, prompt: str) -> list[int]:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub: generation_pb2_grpc.GenerationServiceAsyncStub
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        token_ids: list[int] = []
        async for response in stub.Generate(pb.GenerateRequest(text=prompt, sampling=sampling), timeout=120):
            token_ids.extend(response.chunk.token_ids)
    return token_ids


def proportional_bytes(processes: list[psutil.Process]) -> int:
    """Memory of all of them, each shared page counted once in all."""
    return sum(process.memory_full_info().pss for process in processes)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The answers of one process that holds all experts."""
    with fleet_of(model, "--expert-workers", "0") as alone:
        how: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        return [generate(alone, prompt, **how).token_ids for prompt in PROMPTS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_workers", [40, 64])
async def test_a_large_group_gives_the_answers_of_one_process_at_both_levels_within_12_gib(
    tmp_path: Path, model: Path, expected: list[list[int]], num_workers: int
) -> None:
    async with forkserver(tmp_path) as server, fleet(tmp_path, model, num_workers, (FORKED,)) as running:
        front, address = running.front, running.addresses["grpc"]
        for ep_level in (1, 2, 1):
            front.engine.send(tune(ep_level, tune_id=ep_level, deadline_floor_s=30.0))
            front.engine.send(CommitTune(ep_level))
            found = [await greedy(address, prompt) for prompt in PROMPTS]
            together = await asyncio.gather(*(greedy(address, prompt) for prompt in PROMPTS))
            assert found == expected
            assert together == expected
        executors = server.children()
        assert len(executors) == num_workers
        everyone = [psutil.Process(), *psutil.Process().children(recursive=True)]
        assert proportional_bytes(everyone) < MOST_BYTES
