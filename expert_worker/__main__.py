"""`python -m expert_worker --config FILE [--router HOST:PORT]`: an expert worker as a service."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from common.config import Config, load_config
from common.errors import CheckpointError, ConfigError, ExpertMeshError
from common.lifeline import watch
from common.logs import configure_logging
from expert_worker.agent import Agent

logger = logging.getLogger(__name__)


async def serve(config: Config, lifeline_fd: int | None) -> None:
    """Serve until SIGTERM, SIGINT or the end of the lifeline.

    Raises:
        ExpertMeshError: the worker could not start, or is of no use any more.
    """
    agent = Agent(config)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    if lifeline_fd is not None:
        watch(lifeline_fd, ending.set)
    work: asyncio.Task[None] | None = None
    asked = asyncio.create_task(ending.wait())
    try:
        sys.stdout.write(await agent.listen() + "\n")
        sys.stdout.flush()
        work = asyncio.create_task(agent.run())
        await asyncio.wait([work, asked], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        asked.cancel()
        if work is not None:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await agent.close()


def main() -> int:
    """Parse the arguments and serve; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m expert_worker", description=__doc__)
    parser.add_argument("--config", type=Path, help="JSON file in MindIE's layout; see docs/")
    parser.add_argument("--router", help="HOST:PORT of the router's fleet port")
    parser.add_argument("--worker-id", help="unique in the fleet and the same after a restart")
    parser.add_argument("--lifeline-fd", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    named = {"ExpertMesh.router": arguments.router, "ExpertMesh.workerId": arguments.worker_id}
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    try:
        config = load_config(arguments.config, overrides)
        configure_logging(config.log_level, f"expert-worker {config.worker_id or ''}".rstrip())
        for warning in config.warnings:
            logger.warning("%s", warning)
        asyncio.run(serve(config, arguments.lifeline_fd))
    except (ConfigError, CheckpointError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except ExpertMeshError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
