"""`python -m router --config FILE`: the router as a service."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from common.config import Effective, resolve
from common.errors import CheckpointError, ConfigError, ExpertMeshError
from common.lifeline import watch
from common.logs import configure_logging
from router.front.server import Front

logger = logging.getLogger(__name__)


async def serve(at_start: Effective, lifeline_fd: int | None) -> None:
    """Serve until SIGTERM, SIGINT or the end of the lifeline; SIGHUP reads the configuration file again.

    Raises:
        ExpertMeshError: the router could not start.
    """
    front = Front(at_start)
    asked, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, front.reread_file)
    if lifeline_fd is not None:
        watch(lifeline_fd, at_once.set)
    try:
        sys.stdout.write(await front.listen() + "\n")
        sys.stdout.flush()
        await _run(front, asked, at_once)
    finally:
        await front.close()


async def _run(front: Front, asked: asyncio.Event, at_once: asyncio.Event) -> None:
    work = asyncio.create_task(front.run())
    ending = asyncio.create_task(at_once.wait())
    asking = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait([work, asking, ending], return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and not at_once.is_set():
            logger.info("draining: %d requests are being answered", len(front.journal))
            draining = asyncio.create_task(front.drain(front.config.drain_timeout_s))
            await asyncio.wait([work, draining, ending], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
        if work.done():
            work.result()
    finally:
        for task in (asking, ending):
            task.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def main() -> int:
    """Parse the arguments and serve; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("--config", type=Path, help="JSON file in MindIE's layout; see docs/")
    parser.add_argument("--lifeline-fd", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        at_start = resolve(arguments.config)
        config = at_start.config
        configure_logging(config.log_level, "router")
        for warning in config.warnings:
            logger.warning("%s", warning)
        logger.info("configuration: %s", config.model_dump_json())
        asyncio.run(serve(at_start, arguments.lifeline_fd))
    except (ConfigError, CheckpointError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except ExpertMeshError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
