"""What all commands share at the terminal: consoles, signals, errors as a sentence and an exit status."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from google.protobuf.message import Message
from rich.console import Console

from common.errors import (
    CheckpointError,
    ConfigError,
    ExpertMeshError,
    ReloadRefused,
    RequestError,
    VersionUnknown,
)
from expertmesh.fleet import ServiceEnded

BAD_INPUT = 2
FAILED = 1
BAD_INPUT_ERRORS = (ConfigError, CheckpointError, RequestError, ReloadRefused, VersionUnknown)


def output() -> Console:
    """The console for results. Without colour where stdout is no terminal."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def exit_status(error: ExpertMeshError) -> int:
    """2 where the user's input is at fault, 1 otherwise. A service's own verdict is passed on."""
    if isinstance(error, ServiceEnded):
        return BAD_INPUT if error.status == BAD_INPUT else FAILED
    return BAD_INPUT if isinstance(error, BAD_INPUT_ERRORS) else FAILED


def fail(error: ExpertMeshError) -> int:
    """Print the error's one sentence; return the exit status."""
    where = f" ({error.field})" if isinstance(error, RequestError) and error.field else ""
    print(f"expertmesh: {error}{where}", file=sys.stderr, flush=True)
    return exit_status(error)


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def run(work: Coroutine[Any, Any, None]) -> int:
    """Run a command to its end; return 0, or 128 plus the number of the signal that ended it early.

    The first SIGINT, SIGTERM or SIGHUP cancels the command, which then stops what it started. A second one
    cancels the stopping as well, and everything is killed at once.
    """
    return asyncio.run(_until_signalled(work))


async def _until_signalled(work: Coroutine[Any, Any, None]) -> int:
    task = asyncio.ensure_future(work)
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await task
        return 0
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]


def plain(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON values, every field present, 64-bit numbers as numbers."""
    fields: dict[str, Any] = {}
    for one in message.DESCRIPTOR.fields:
        value = getattr(message, one.name)
        if one.is_repeated:
            fields[one.name] = [plain(item) if one.message_type else item for item in value]
        else:
            fields[one.name] = plain(value) if one.message_type else value
    return fields
