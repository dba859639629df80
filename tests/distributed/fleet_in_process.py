"""A router's front and the agents of its workers in this process; engine and executors are real processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from common.config import load_config, resolve
from expert_worker.agent import Agent
from expert_worker.executor_link import EXECUTOR_MODULE
from router.front.server import Front
from tests.router.front_fleet import TOKEN, Running

READY_TIMEOUT_S = 240.0


class Fleet(Running):
    """A front that runs, its clients, and the agents of its workers, by ep_rank where they came in order."""

    def __init__(self, front: Front, line: str) -> None:
        super().__init__(front, line)
        self.workers: list[Agent] = []


def configuration(folder: Path, model: Path, num_workers: int, **own: Any) -> Path:
    (folder / "token").write_text(TOKEN)
    settings = {"fleetPort": 0, "fleetTokenFile": str(folder / "token"), "threads": 1, **own}
    document = {
        "ServerConfig": {"port": 0, "managementPort": 0},
        "ModelDeployConfig": {
            "maxSeqLen": 256,
            "ModelConfig": [{"modelWeightPath": str(model), "worldSize": num_workers, "cpuMemSize": 0.1}],
        },
        "ExpertMesh": {"registerTimeoutSeconds": 120, "deadlineFloorSeconds": 30, **settings},
    }
    file = folder / "config.json"
    file.write_text(json.dumps(document))
    return file


@asynccontextmanager
async def fleet(
    folder: Path,
    model: Path,
    num_workers: int,
    executor_modules: Sequence[str] = (EXECUTOR_MODULE,),
    **own: Any,
) -> AsyncIterator[Fleet]:
    """A fleet that is ready; its workers take turns with the modules."""
    file = configuration(folder, model, num_workers, **own)
    front = Front(resolve(file))
    running = Fleet(front, await front.listen())
    work = [asyncio.create_task(front.run())]
    for index in range(num_workers):
        overrides = {"ExpertMesh.router": running.addresses["fleet"], "ExpertMesh.workerId": f"w{index}"}
        module = executor_modules[index % len(executor_modules)]
        agent = Agent(load_config(file, overrides), module)
        running.workers.append(agent)
        await agent.listen()
        work.append(asyncio.create_task(agent.run()))
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not front.state.is_ready:
                for one in work:
                    if one.done():
                        one.result()
                await asyncio.sleep(0.1)
        yield running
    finally:
        for one in work:
            one.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await asyncio.gather(*(agent.close() for agent in running.workers))
        await front.close()
        await running.channel.close()
        await running.admin_channel.close()
