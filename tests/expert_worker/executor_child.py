"""A real executor at the other end of a real channel, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from common.child_process import ChildProcess
from common.placement import Placement
from common.process_group import StoreServer
from common.progress_counter import ProgressCounter
from expert_worker.executor_link import EXECUTOR_MODULE
from expert_worker.messages import TO_AGENT, Configure, Prepare, Ready

ANSWER_TIMEOUT_S = 60.0
JOIN_TIMEOUT_S = 20.0
TERM, INCARNATION = 3, 7


class ExecutorChild:
    """Speaks for the agent."""

    def __init__(self, process: ChildProcess, progress: ProgressCounter) -> None:
        self.process = process
        self.progress = progress
        self._messages = aiter(process.channel)

    def send(self, message: object) -> None:
        self.process.channel.send(message)

    async def until(self, wanted: type) -> Any:
        """The next message of a class."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            async for message in self._messages:
                if isinstance(message, wanted):
                    return message
        raise AssertionError(f"the executor ended before it sent {wanted.__name__}")


@asynccontextmanager
async def executor(exchange: str = "links") -> AsyncIterator[ExecutorChild]:
    """An executor that is ready."""
    progress = ProgressCounter.create()
    process = await ChildProcess.start(EXECUTOR_MODULE, TO_AGENT, progress)
    child = ExecutorChild(process, progress)
    try:
        child.send(Configure("cpu", 1, "127.0.0.1", exchange, "auto"))
        await child.until(Ready)
        yield child
    finally:
        process.kill()
        await process.wait()
        progress.close()


def prepare(
    checkpoint: Path, placement: Placement, ep_rank: int, store: StoreServer, epoch: int = 1, **other: Any
) -> Prepare:
    """The Prepare of one worker; the prefix of its link follows from epoch and rank."""
    fields: dict[str, Any] = {
        "term": TERM,
        "epoch": epoch,
        "incarnation": INCARNATION,
        "ep_rank": ep_rank,
        "ep_size": placement.ep_size,
        "model_path": str(checkpoint),
        "dtype": "float32",
        "layers": [[layer_id, list(own)] for layer_id, own in placement.experts_of(ep_rank).items()],
        "int8_layers": [],
        "exchange": "links",
        "host": store.host,
        "port": store.port,
        "prefix": prefix_of(epoch, ep_rank),
        "timeout_s": JOIN_TIMEOUT_S,
        "buffer_bytes": 0,
    }
    return Prepare(**fields | other)


def prefix_of(epoch: int, ep_rank: int) -> str:
    return f"epoch{epoch}-rank{ep_rank}"
