"""Shows how far a fleet has loaded: bars on a terminal, a line every few seconds elsewhere; on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.errors import ExpertMeshError
from expertmesh.admin_client import AdminClient
from protos import admin_pb2

INTERVAL_S = 0.25
LINE_EVERY_S = 5.0
RETRY_S = 0.5

Amounts = dict[str, tuple[int, int]]
"""Per service: bytes loaded, bytes in all (0 while unknown)."""


@contextlib.asynccontextmanager
async def loading(admin: str) -> AsyncIterator[None]:
    """Show the loading of the fleet whose admin port is `admin` for as long as the block runs."""
    display = asyncio.create_task(show_loading(admin))
    try:
        yield
    finally:
        display.cancel()
        await asyncio.wait([display])


async def show_loading(admin: str) -> None:
    """Show the progress of the fleet whose admin port is `admin` until it is ready or this is cancelled."""
    display = Bars() if sys.stderr.isatty() else Lines()
    with display:
        while True:
            # A router that is not reachable yet, or for a moment, costs nothing but a gap in the display.
            with contextlib.suppress(ExpertMeshError):
                async with AdminClient(admin) as client:
                    async for status in client.watch(INTERVAL_S):
                        display.show(amounts_of(status), status.not_ready_reason)
                        if status.ready:
                            return
            await asyncio.sleep(RETRY_S)


def amounts_of(status: admin_pb2.GetStatusResponse) -> Amounts:
    """How much each service of the fleet has loaded."""
    amounts = {"router": (status.engine_loaded_bytes, status.engine_total_bytes)}
    for worker in status.workers:
        amounts[worker.worker_id] = (worker.loaded_bytes, worker.total_bytes)
    return amounts


class Bars:
    """One bar per service, on a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:>12}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, amounts: Amounts, reason: str) -> None:
        """Move the bars. The reason is in the logs; a bar says it all."""
        for name, (loaded, total) in amounts.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=None)
            self._progress.update(self._tasks[name], completed=loaded, total=total or None)


class Lines:
    """One line every few seconds, where nobody can watch a bar."""

    def __init__(self) -> None:
        self._next_line = time.monotonic() + LINE_EVERY_S

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, amounts: Amounts, reason: str) -> None:
        """Write the line when it is due."""
        if time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINE_EVERY_S
        parts = [f"{name} {_megabytes(*amount)}" for name, amount in amounts.items()]
        print(f"loading: {', '.join(parts)}{f' ({reason})' if reason else ''}", file=sys.stderr, flush=True)


def _megabytes(loaded: int, total: int) -> str:
    return f"{loaded / 1e6:.0f}/{total / 1e6:.0f} MB" if total else f"{loaded / 1e6:.0f} MB"
